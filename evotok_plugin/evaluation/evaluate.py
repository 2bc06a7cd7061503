"""Evaluation of a tokenizer on a source of images, by one process or several."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from evotok_plugin.common.files import cache_folder
from evotok_plugin.common.processes import Processes
from evotok_plugin.common.progress import progress_bar
from evotok_plugin.data.bad_samples import BadSamples
from evotok_plugin.data.batches import decoded
from evotok_plugin.data.sources import ImageSource
from evotok_plugin.evaluation.measuring import measure
from evotok_plugin.evaluation.meters import (
    ImageMean,
    Meter,
    Probes,
    ReconstructionFid,
    TeacherCosine,
    TokenizedBatch,
    Usage,
)
from evotok_plugin.evaluation.metric_choice import chosen_metrics, not_measured, without_untrained
from evotok_plugin.evaluation.options import EvaluationOptions
from evotok_plugin.evaluation.report import Evaluation
from evotok_plugin.evaluation.statistics_cache import StatisticsCache
from evotok_plugin.evaluation.zero_shot import ZeroShot
from evotok_plugin.image_processing_evotok import EvoTokImageProcessor
from evotok_plugin.losses.perceptual import load_lpips
from evotok_plugin.metrics.image import psnr, ssim
from evotok_plugin.metrics.inception import load_inception
from evotok_plugin.modeling_evotok import EvoTokModel

T = TypeVar("T")


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
    metrics = without_untrained(chosen_metrics(options, source), options, model)
    networks = first_then_others(processes, lambda: load_networks(metrics, options, model.device))
    meters = _meters(metrics, networks, model, processor, source, options, processes)
    measured = measure(
        source, meters, lambda bad: _tokenized(model, processor, source, options, processes, bad), options, processes
    )
    if measured is None:
        return None
    bad, pictures = measured
    values = _values(model, processor, source, meters, bad)
    return Evaluation(values | {"not_measured": not_measured(metrics, options, source, model)}, pictures)


# Measuring -----------------------------------------------------------------------------------------------------


def first_then_others(processes: Processes, make: Callable[[], T]) -> T:
    """Call `make` in the first process and then in the others, which find the files that the first has downloaded."""
    if processes.is_first:
        made = make()
    processes.barrier()
    if not processes.is_first:
        made = make()
    return made


def load_networks(metrics: Sequence[str], options: EvaluationOptions, device: torch.device) -> dict[str, nn.Module]:
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
    def cosine() -> TeacherCosine:
        assert options.teacher is not None, "`chosen_metrics` has checked this"
        return TeacherCosine(model, options.teacher, processor.size)

    def zero_shot() -> ZeroShot:
        assert options.classifier is not None, "`chosen_metrics` has checked this"
        return ZeroShot(source, options.classifier, options.class_names, options.teacher)

    semantic: dict[str, Callable[[], Meter]] = {
        "usage": lambda: Usage(model),
        "cosine": cosine,
        "probes": lambda: Probes(source),
        "zero_shot": zero_shot,
    }
    makers = pixel_meters(networks, processor, source, options, processes) | semantic
    return [makers[metric]() for metric in metrics]


def pixel_meters(
    networks: dict[str, nn.Module],
    processor: EvoTokImageProcessor,
    source: ImageSource,
    options: EvaluationOptions,
    processes: Processes,
) -> dict[str, Callable[[], Meter]]:
    """Functions that create the meters of metrics that compare images only, by metric.

    Args:
        processor: crops the originals.
    """

    def rfid() -> ReconstructionFid:
        folder = options.stats_cache or cache_folder("inception")
        cache = StatisticsCache(folder, source, processor) if processes.is_first else None
        return ReconstructionFid(networks["rfid"], cache, processes)

    return {
        "psnr": lambda: ImageMean("psnr", psnr),
        "ssim": lambda: ImageMean("ssim", ssim),
        "rfid": rfid,
        "lpips": lambda: ImageMean("lpips", lambda pixels, target: networks["lpips"](pixels, target).flatten()),
    }


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
