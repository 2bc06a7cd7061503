"""Evaluation of a tokenizer on a source of images, by one process or several."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn

from evotok_plugin.common.files import cache_folder
from evotok_plugin.common.processes import Processes
from evotok_plugin.common.progress import progress_bar
from evotok_plugin.data.bad_samples import BadSamples
from evotok_plugin.data.batches import decoded
from evotok_plugin.data.sources import ImageSource, evenly_spread
from evotok_plugin.errors import UserError
from evotok_plugin.evaluation.meters import (
    ImageMean,
    Meter,
    Probes,
    ReconstructionFid,
    TeacherCosine,
    TokenizedBatch,
    Usage,
)
from evotok_plugin.evaluation.report import GRID_COLUMNS, Evaluation
from evotok_plugin.evaluation.statistics_cache import StatisticsCache
from evotok_plugin.image_processing_evotok import EvoTokImageProcessor
from evotok_plugin.losses.perceptual import load_lpips
from evotok_plugin.metrics import probes
from evotok_plugin.metrics.image import psnr, ssim
from evotok_plugin.metrics.inception import load_inception
from evotok_plugin.modeling_evotok import EvoTokModel
from evotok_plugin.teacher import Teacher

logger = logging.getLogger(__name__)
T = TypeVar("T")

METRICS = ("psnr", "ssim", "usage", "cosine", "probes", "rfid", "lpips")
_DOWNLOADED = ("rfid", "lpips")  # measured only on request because their weights have to be downloaded


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """Metrics and settings of an evaluation.

    Attributes:
        metrics: some of `METRICS`, or `("all",)`; by default all that need no download: psnr, ssim, usage, cosine (with
            a teacher) and probes (with labels).
        teacher: on the model's device.
        inception_weights: weights file of the Inception network, by default in torch's hub folder.
        stats_cache: folder for statistics of real images, by default in the user's cache folder.
        max_bad_fraction: fraction of broken images that is tolerated.
        report: file to list broken images in.
        num_pictures: number of originals and reconstructions that are kept for the grid.

    Raises:
        UserError: a number is out of range.
    """

    metrics: Sequence[str] | None = None
    teacher: Teacher | None = None
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


@torch.inference_mode()
def evaluate(
    model: EvoTokModel,
    processor: EvoTokImageProcessor,
    source: ImageSource,
    options: EvaluationOptions | None = None,
    processes: Processes | None = None,
) -> Evaluation | None:
    """Reconstruct the images of a source and measure the chosen metrics.

    Images are compared as the processor crops them. Several processes share the images and combine their results.

    Args:
        model: in eval mode, on the device to use; identical in every process.

    Returns:
        The results in the first process; None in the others.

    Raises:
        UserError: a requirement of a metric is missing, or too many images are broken.
    """
    if model.training:
        raise ValueError("the model is in training mode and would learn from these images; call model.eval()")
    options = options or EvaluationOptions()
    processes = processes or Processes(0, 1, model.device)
    metrics = _without_untrained(chosen_metrics(options, source), options, model)
    networks = _first_then_others(processes, lambda: _networks(metrics, options, model.device))
    meters = _meters(metrics, networks, model, processor, source, options, processes)
    pictures = _Pictures(evenly_spread(len(source), options.num_pictures))
    accumulators: list[_Accumulator] = [*meters, pictures]
    bad = _own_bad_samples(options, processes)
    # By default, convolutions on GPUs are rounded to TF32.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for batch in _tokenized(model, processor, source, options, processes, bad):
            for accumulator in accumulators:
                accumulator.update(batch)
    bad = _all_bad_samples(bad, processes)
    bad.check(len(source))
    if len(bad.reasons) == len(source):
        raise UserError(f"none of the {len(source)} images of {source.name!r} can be read")
    if bad.reasons and processes.is_first:
        logger.warning("skipped %d of %d images: %s", len(bad.reasons), len(source), _first_few(bad.reasons))
    for accumulator in accumulators:
        accumulator.add_up(processes)
    if not processes.is_first:
        return None
    return Evaluation(_values(model, processor, source, meters, bad), pictures.pairs())


def chosen_metrics(options: EvaluationOptions, source: ImageSource) -> list[str]:
    """Choose the metrics to measure, in the order of `METRICS`.

    Metrics requested by name are all measured; of `all`, or of the default, those that the teacher, the labels and the
    number of images allow.

    Raises:
        UserError: a metric is unknown, or was requested by name and lacks a requirement.
    """
    requested = list(options.metrics or ())
    if unknown := [metric for metric in requested if metric not in (*METRICS, "all")]:
        raise UserError(f"unknown metric {unknown[0]!r}; expected all, or some of {', '.join(METRICS)}")
    default = [metric for metric in METRICS if metric not in _DOWNLOADED]
    wanted = METRICS if "all" in requested else requested or default
    lacking = _lacking(wanted, options, source)
    for metric in requested:
        if metric in lacking:
            raise UserError(f"{metric} cannot be measured: {lacking[metric]}")
    chosen = [metric for metric in METRICS if metric in wanted and metric not in lacking]
    if "probes" in chosen:
        probes.check_installed()
    return chosen


def _without_untrained(metrics: list[str], options: EvaluationOptions, model: EvoTokModel) -> list[str]:
    """Remove the metrics of semantic features if the semantic decoder was not trained.

    Raises:
        UserError: such a metric was requested by name.
    """
    if model.config.semantic_decoder_trained:
        return metrics
    semantic = [metric for metric in ("cosine", "probes") if metric in metrics]
    if set(semantic) & set(options.metrics or ()):
        model.config.require_semantics()
    if semantic:
        logger.warning(
            "not measured: %s; the semantic decoder was not trained, because the tokenizer had no teacher",
            ", ".join(semantic),
        )
    return [metric for metric in metrics if metric not in semantic]


def _lacking(wanted: Sequence[str], options: EvaluationOptions, source: ImageSource) -> dict[str, str]:
    """Metrics that cannot be measured, with the reason."""
    lacking = {}
    if options.teacher is None:
        lacking["cosine"] = "it compares features with a teacher's; pass --teacher FOLDER"
    if len(source) < 2:
        lacking["rfid"] = f"it needs at least 2 images, {source.name!r} has {len(source)}"
    if "probes" in wanted:
        labels = [source.label(index) for index in probes.probed_images(len(source))]
        if not probes.in_classes(labels).any():
            lacking["probes"] = (
                f"{source.name!r} needs at least 2 classes of at least 2 images each; labels are the names of the "
                "images' folders, .cls files in shards, or a column `label`"
            )
    return lacking


# Measuring -----------------------------------------------------------------------------------------------------


def _first_then_others(processes: Processes, make: Callable[[], T]) -> T:
    """Call `make` in the first process and then in the others, which find the files that the first has downloaded."""
    if processes.is_first:
        made = make()
    processes.barrier()
    if not processes.is_first:
        made = make()
    return made


def _networks(metrics: Sequence[str], options: EvaluationOptions, device: torch.device) -> dict[str, nn.Module]:
    """Networks that metrics use, by metric."""
    networks: dict[str, nn.Module] = {}
    if "rfid" in metrics:
        networks["rfid"] = load_inception(options.inception_weights).to(device)
    if "lpips" in metrics:
        networks["lpips"] = load_lpips().to(device)
    return networks


def _meters(
    metrics: Sequence[str],
    networks: dict[str, nn.Module],
    model: EvoTokModel,
    processor: EvoTokImageProcessor,
    source: ImageSource,
    options: EvaluationOptions,
    processes: Processes,
) -> list[Meter]:
    def rfid() -> ReconstructionFid:
        folder = options.stats_cache or cache_folder("inception")
        cache = StatisticsCache(folder, source, processor) if processes.is_first else None
        return ReconstructionFid(networks["rfid"], cache, processes)

    def cosine() -> TeacherCosine:
        assert options.teacher is not None, "`chosen_metrics` has checked this"
        return TeacherCosine(model, options.teacher, processor.size)

    makers: dict[str, Callable[[], Meter]] = {
        "psnr": lambda: ImageMean("psnr", psnr),
        "ssim": lambda: ImageMean("ssim", ssim),
        "usage": lambda: Usage(model),
        "cosine": cosine,
        "probes": lambda: Probes(source),
        "rfid": rfid,
        "lpips": lambda: ImageMean("lpips", lambda pixels, target: networks["lpips"](pixels, target).flatten()),
    }
    return [makers[metric]() for metric in metrics]


class _Accumulator(Protocol):
    """Results that are collected batch by batch and then over all processes."""

    def update(self, batch: TokenizedBatch) -> None: ...

    def add_up(self, processes: Processes) -> None: ...


class _Pictures:
    """Selected images with their reconstructions, for the grid."""

    def __init__(self, wanted: Sequence[int]) -> None:
        self._wanted = frozenset(wanted)
        self._pairs: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, batch: TokenizedBatch) -> None:
        for place, index in enumerate(batch.indices):
            if index in self._wanted:
                self._pairs[index] = (batch.originals[place].cpu(), batch.rebuilt[place].cpu())

    def add_up(self, processes: Processes) -> None:
        self._pairs = {index: pair for pairs in processes.gather(self._pairs) for index, pair in pairs.items()}

    def pairs(self) -> list[tuple[Image.Image, Image.Image]]:
        ordered = (pair for _, pair in sorted(self._pairs.items()))
        return [(_as_pil(original), _as_pil(rebuilt)) for original, rebuilt in ordered]


def _as_pil(pixels: Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def _values(
    model: EvoTokModel,
    processor: EvoTokImageProcessor,
    source: ImageSource,
    meters: Sequence[Meter],
    bad: BadSamples,
) -> dict[str, Any]:
    values: dict[str, Any] = {
        "model": model.name_or_path,
        "source": source.name,
        "images": len(source) - len(bad.reasons),
        "bad_images": len(bad.reasons),
        "image_size": processor.size,
        "pixel_depth": model.config.pixel_depth,
        "semantic_depth": model.config.semantic_depth,
        "fingerprint": model.fingerprint(),
    }
    for meter in meters:
        values |= meter.results()
    return values


# Images --------------------------------------------------------------------------------------------------------


def _tokenized(
    model: EvoTokModel,
    processor: EvoTokImageProcessor,
    source: ImageSource,
    options: EvaluationOptions,
    processes: Processes,
    bad: BadSamples,
) -> Iterator[TokenizedBatch]:
    """This process's images, each decoded once, in the background; broken ones are added to `bad`.

    Raises:
        UserError: too many images are broken, even if all others can be read.
    """
    own = range(processes.rank, len(source), processes.world_size)
    num_batches = -(-len(own) // options.batch_size)
    batches = decoded(source, own, processor, options.batch_size, options.num_workers)
    silent = not processes.is_first or num_batches <= 1
    with progress_bar(total=len(own), unit="image", disable=silent) as bar:
        for batch in batches:
            for index, reason in batch.broken.items():
                bad.add(source.key(index), reason)
            if len(bad.reasons) > bad.limit * len(source):
                bad.check(len(source))
            if batch.indices:
                yield TokenizedBatch(model, batch.indices, batch.pixels.to(model.device))
            bar.update(len(batch))


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
