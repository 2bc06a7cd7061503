"""Options of an evaluation."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from evotok_plugin.errors import UserError
from evotok_plugin.evaluation.report import GRID_COLUMNS

if TYPE_CHECKING:  # slow imports, which the flags of `evotok evaluate` do not need
    from evotok_plugin.metrics.zero_shot import ZeroShotClassifier
    from evotok_plugin.teacher import Teacher

METRICS = ("psnr", "ssim", "usage", "cosine", "probes", "zero_shot", "rfid", "lpips")


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """Metrics and settings of an evaluation.

    Attributes:
        metrics: some of `METRICS`, or `("all",)`; by default all that need no download: psnr, ssim, usage, cosine (with
            a teacher), probes (with labels) and zero_shot (with labels and a teacher with a text tower).
        teacher: on the model's device.
        classifier: the zero-shot classifier of the teacher, on the model's device.
        class_names: words for labels that are no words, by label.
        inception_weights: weights file of the Inception network, by default in torch's hub folder.
        stats_cache: folder for statistics of real images, by default in the user's cache folder.
        max_bad_fraction: fraction of broken images that is tolerated.
        report: file to list broken images in.
        num_pictures: number of originals and reconstructions that are kept for the grid.

    Raises:
        UserError: a number is out of range.
    """

    metrics: Sequence[str] | None = None
    teacher: "Teacher | None" = None
    classifier: "ZeroShotClassifier | None" = None
    class_names: Mapping[str, str] = field(default_factory=dict)
    inception_weights: str | Path | None = None
    stats_cache: Path | None = None
    batch_size: int = 32
    num_workers: int = min(4, os.cpu_count() or 1)
    max_bad_fraction: float = 0.001
    report: Path | None = None
    num_pictures: int = 2 * GRID_COLUMNS

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("num_workers", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, got {getattr(self, name)}")
