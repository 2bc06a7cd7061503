"""The loop of an evaluation: batches of originals and reconstructions, meters, pictures, and broken images."""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from evotok_plugin.common.processes import Processes
from evotok_plugin.data.bad_samples import BadSamples
from evotok_plugin.data.sources import ImageSource, evenly_spread
from evotok_plugin.errors import UserError
from evotok_plugin.evaluation.meters import Meter
from evotok_plugin.evaluation.options import EvaluationOptions

logger = logging.getLogger(__name__)

Pairs = list[tuple[Image.Image, Image.Image]]


class PairedBatch(Protocol):
    """Originals and reconstructions of the images `indices`, (B, 3, H, W) in uint8."""

    @property
    def indices(self) -> list[int]: ...

    @property
    def originals(self) -> Tensor: ...

    @property
    def rebuilt(self) -> Tensor: ...


def measure(
    source: ImageSource,
    meters: Sequence[Meter],
    batches: Callable[[BadSamples], Iterator],
    options: EvaluationOptions,
    processes: Processes,
) -> tuple[BadSamples, Pairs] | None:
    """Update the meters with all batches and combine the processes.

    Args:
        batches: yields this process's batches; adds broken images to its argument.

    Returns:
        In the first process, the broken images of all processes, and pairs of an original and its reconstruction for
        the grid; None in the others.

    Raises:
        UserError: too many images are broken.
    """
    pictures = _Pictures(evenly_spread(len(source), options.num_pictures))
    bad = _own_bad_samples(options, processes)
    # By default, convolutions on GPUs are rounded to TF32.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for batch in batches(bad):
            pictures.update(batch)
            for meter in meters:
                meter.update(batch)
    bad = _all_bad_samples(bad, processes)
    bad.check(len(source))
    if len(bad.reasons) == len(source):
        raise UserError(f"none of the {len(source)} images of {source.name!r} can be read")
    if bad.reasons and processes.is_first:
        logger.warning("skipped %d of %d images: %s", len(bad.reasons), len(source), _first_few(bad.reasons))
    pictures.add_up(processes)
    for meter in meters:
        meter.add_up(processes)
    return (bad, pictures.pairs()) if processes.is_first else None


class _Pictures:
    """Selected images with their reconstructions, for the grid."""

    def __init__(self, wanted: Sequence[int]) -> None:
        self._wanted = frozenset(wanted)
        self._pairs: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, batch: PairedBatch) -> None:
        for place, index in enumerate(batch.indices):
            if index in self._wanted:
                self._pairs[index] = (batch.originals[place].cpu(), batch.rebuilt[place].cpu())

    def add_up(self, processes: Processes) -> None:
        self._pairs = {index: pair for pairs in processes.gather(self._pairs) for index, pair in pairs.items()}

    def pairs(self) -> Pairs:
        ordered = (pair for _, pair in sorted(self._pairs.items()))
        return [(_as_pil(original), _as_pil(rebuilt)) for original, rebuilt in ordered]


def _as_pil(pixels: Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def _own_bad_samples(options: EvaluationOptions, processes: Processes) -> BadSamples:
    """The collector of one process; other processes than the first write their reports next to the requested file."""
    report = options.report
    if report is not None and not processes.is_first:
        report = report.with_name(f"{report.stem}.{processes.rank}{report.suffix}")
    return BadSamples(report, options.max_bad_fraction)


def _all_bad_samples(own: BadSamples, processes: Processes) -> BadSamples:
    reasons = {name: reason for part in processes.gather(own.reasons) for name, reason in part.items()}
    return BadSamples(own.report if processes.is_first else None, own.limit, reasons)


def _first_few(reasons: dict[str, str], count: int = 3) -> str:
    few = [f"{name} ({reason})" for name, reason in list(reasons.items())[:count]]
    return ", ".join(few) + (f" and {len(reasons) - count} more" if len(reasons) > count else "")
