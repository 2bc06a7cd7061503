"""Measurement of reconstructions that another program wrote: rFID, PSNR, SSIM and LPIPS of any tokenizer's images.

Originals are cropped exactly as for EvoTok itself, so that tokenizers are compared on the same pixels.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evotok_plugin.common.processes import Processes
from evotok_plugin.common.progress import progress_bar
from evotok_plugin.data.bad_samples import BadSamples
from evotok_plugin.data.batches import ImageBatch, decoded
from evotok_plugin.data.sources import ImageSource, Subset
from evotok_plugin.errors import UserError
from evotok_plugin.evaluation.evaluate import first_then_others, load_networks, pixel_meters
from evotok_plugin.evaluation.measuring import measure
from evotok_plugin.evaluation.metric_choice import PIXEL_METRICS, chosen_metrics, not_measured
from evotok_plugin.evaluation.options import EvaluationOptions
from evotok_plugin.evaluation.report import Evaluation
from evotok_plugin.image_processing_evotok import EvoTokImageProcessor, to_pixel_values

_INSTEAD = "reconstructions are images without codes or features; pass --model FOLDER instead of --reconstructions"


@dataclass(frozen=True)
class GivenBatch:
    """Originals and given reconstructions (B, 3, H, W) in uint8 of the images `indices`."""

    indices: list[int]
    originals: Tensor
    rebuilt: Tensor

    @cached_property
    def pixel_values(self) -> Tensor:
        """Originals (B, 3, H, W) in [-1, 1]."""
        return to_pixel_values(self.originals, self.originals.device)

    @cached_property
    def pixels(self) -> Tensor:
        """Reconstructions (B, 3, H, W) in [-1, 1]."""
        return to_pixel_values(self.rebuilt, self.rebuilt.device)


@torch.inference_mode()
def evaluate_reconstructions(
    source: ImageSource,
    reconstructions: ImageSource,
    options: EvaluationOptions | None = None,
    processes: Processes | None = None,
) -> Evaluation | None:
    """Compare the images of a source with reconstructions of the same names.

    The reconstructions must be squares of one size, to which the originals are cropped: the shorter side resized
    (bicubic), then the center.

    Returns:
        The results in the first process; None in the others.

    Raises:
        UserError: a reconstruction is missing, or has another size than the first; a requirement of a metric is
            missing, or too many images are broken.
    """
    options, processes = options or EvaluationOptions(), processes or Processes(0, 1, torch.device("cpu"))
    paired = Subset(reconstructions, pairing(source, reconstructions))
    processor = EvoTokImageProcessor(size=_side_of(paired))
    metrics = chosen_metrics(options, source, PIXEL_METRICS, _INSTEAD)
    networks = first_then_others(processes, lambda: load_networks(metrics, options, processes.device))
    makers = pixel_meters(networks, processor, source, options, processes)
    meters = [makers[metric]() for metric in metrics]
    measured = measure(
        source, meters, lambda bad: _given(source, paired, processor, options, processes, bad), options, processes
    )
    if measured is None:
        return None
    bad, pictures = measured
    values: dict[str, Any] = {
        "reconstructions": reconstructions.name,
        "source": source.name,
        "images": len(source) - len(bad.reasons),
        "bad_images": len(bad.reasons),
        "image_size": processor.size,
    }
    for meter in meters:
        values |= meter.results()
    values["not_measured"] = not_measured(metrics, options, source, possible=PIXEL_METRICS)
    return Evaluation(values, pictures)


def pairing(source: ImageSource, reconstructions: ImageSource) -> np.ndarray:
    """For every image of a source, the index of its reconstruction (len(source),).

    Names are compared without suffix: as paths relative to their folders, or, if no path matches, as file names that
    are unique on both sides.

    Raises:
        UserError: an image without a reconstruction, or names that are not unique.
    """
    for name_of in (_path_of, _file_name_of):
        theirs = _indices_by_name(reconstructions, name_of)
        wanted = [name_of(source.key(index)) for index in range(len(source))]
        missing = [name for name in wanted if name not in theirs]
        if len(missing) == len(wanted):
            continue
        if missing:
            raise UserError(
                f"{len(missing)} of {len(source)} images have no reconstruction in {reconstructions.name!r}, first "
                f"{missing[0]!r}; reconstruct them, or evaluate only the images that were reconstructed"
            )
        if len(set(wanted)) < len(wanted):
            raise UserError(
                f"several images of {source.name!r} are called alike; give both folders the same subfolders"
            )
        return np.array([theirs[name] for name in wanted])
    raise UserError(
        f"no image of {source.name!r} has a reconstruction in {reconstructions.name!r}: expected files of the same "
        f"names, such as {PurePosixPath(source.key(0)).with_suffix('.png')}, got {reconstructions.key(0)}"
    )


def _path_of(key: str) -> str:
    return str(PurePosixPath(key).with_suffix(""))


def _file_name_of(key: str) -> str:
    return PurePosixPath(key).stem


def _indices_by_name(source: ImageSource, name_of: Any) -> dict[str, int]:
    found: dict[str, int] = {}
    for index in range(len(source)):
        name = name_of(source.key(index))
        if name in found:
            raise UserError(f"{source.name!r} has several reconstructions called {name!r}; keep one of each image")
        found[name] = index
    return found


def _side_of(reconstructions: ImageSource) -> int:
    width, height = reconstructions.picture(0).size
    if width != height:
        raise UserError(
            f"reconstruction {reconstructions.key(0)} has {width} x {height} pixels, expected a square: write the "
            "tokenizer's output for the center crop of each image"
        )
    return width


def _given(
    source: ImageSource,
    paired: ImageSource,
    processor: EvoTokImageProcessor,
    options: EvaluationOptions,
    processes: Processes,
    bad: BadSamples,
) -> Iterator[GivenBatch]:
    """This process's images with their reconstructions; pairs with a broken image are added to `bad`.

    Raises:
        UserError: a reconstruction of another size, or too many broken images.
    """
    own = range(processes.rank, len(source), processes.world_size)
    ours, theirs = (
        decoded(images, own, processor, options.batch_size, options.num_workers) for images in (source, paired)
    )
    with progress_bar(total=len(own), unit="image", disable=not processes.is_first) as bar:
        for originals, rebuilt in zip(ours, theirs, strict=True):
            _check_sizes(rebuilt, paired, processor.size)
            for index, reason in (originals.broken | rebuilt.broken).items():
                bad.add(source.key(index), reason)
            if len(bad.reasons) > bad.limit * len(source):
                bad.check(len(source))
            both = sorted(set(originals.indices) & set(rebuilt.indices))
            if both:
                pixels = [part.pixels[[part.indices.index(index) for index in both]] for part in (originals, rebuilt)]
                yield GivenBatch(both, *(part.to(processes.device) for part in pixels))
            bar.update(len(originals))


def _check_sizes(batch: ImageBatch, paired: ImageSource, side: int) -> None:
    for index, size in zip(batch.indices, batch.sizes, strict=True):
        if size != (side, side):
            raise UserError(
                f"reconstruction {paired.key(index)} has {size[0]} x {size[1]} pixels, the first one {side} x {side}; "
                "expected one size"
            )
