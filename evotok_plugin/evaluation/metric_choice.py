"""The choice of the metrics of an evaluation, and the reasons for those that are not measured."""

import logging
from collections.abc import Collection, Sequence

from evotok_plugin.data.sources import ImageSource
from evotok_plugin.errors import UserError
from evotok_plugin.evaluation.options import METRICS, EvaluationOptions
from evotok_plugin.metrics import probes
from evotok_plugin.metrics.zero_shot import unnamed
from evotok_plugin.modeling_evotok import EvoTokModel

logger = logging.getLogger(__name__)

PIXEL_METRICS = ("psnr", "ssim", "rfid", "lpips")  # those that compare images only
_DOWNLOADED = ("rfid", "lpips")  # measured only on request because their weights have to be downloaded
_SEMANTIC = ("cosine", "probes", "zero_shot")


def chosen_metrics(
    options: EvaluationOptions, source: ImageSource, possible: Sequence[str] = METRICS, instead: str = ""
) -> list[str]:
    """Choose the metrics to measure, in the order of `METRICS`.

    Metrics requested by name are all measured; of `all`, or of the default, those that the teacher, the labels and the
    number of images allow.

    Args:
        possible: the metrics that this kind of evaluation has.
        instead: for the error: why it has no others.

    Raises:
        UserError: a metric is unknown, or was requested by name and lacks a requirement.
    """
    requested = list(options.metrics or ())
    if unknown := [metric for metric in requested if metric not in (*METRICS, "all")]:
        raise UserError(f"unknown metric {unknown[0]!r}; expected all, or some of {', '.join(METRICS)}")
    default = [metric for metric in METRICS if metric not in _DOWNLOADED]
    wanted = METRICS if "all" in requested else requested or default
    lacking = {metric: instead for metric in METRICS if metric not in possible}
    lacking |= lacking_metrics([metric for metric in wanted if metric in possible], options, source)
    for metric in requested:
        if metric in lacking:
            raise UserError(f"{metric} cannot be measured: {lacking[metric]}")
    chosen = [metric for metric in METRICS if metric in wanted and metric not in lacking]
    if "probes" in chosen:
        probes.check_installed()
    return chosen


def without_untrained(metrics: list[str], options: EvaluationOptions, model: EvoTokModel) -> list[str]:
    """Remove the metrics of semantic features if the semantic decoder was not trained.

    Raises:
        UserError: such a metric was requested by name.
    """
    if model.config.semantic_decoder_trained:
        return metrics
    semantic = [metric for metric in _SEMANTIC if metric in metrics]
    if set(semantic) & set(options.metrics or ()):
        model.config.require_semantics()
    if semantic:
        logger.warning(
            "not measured: %s; the semantic decoder was not trained, because the tokenizer had no teacher",
            ", ".join(semantic),
        )
    return [metric for metric in metrics if metric not in semantic]


def not_measured(
    metrics: Collection[str],
    options: EvaluationOptions,
    source: ImageSource,
    model: EvoTokModel | None = None,
    possible: Sequence[str] = METRICS,
) -> dict[str, str]:
    """The possible metrics that are not among `metrics`, with the reason and the way to get them."""
    others = [metric for metric in possible if metric not in metrics]
    reasons = dict.fromkeys(others, "not requested; add it to --metrics")
    reasons |= {name: f"its weights are downloaded; add {name} to --metrics" for name in _DOWNLOADED if name in others}
    reasons |= lacking_metrics(others, options, source)
    if model is not None and not model.config.semantic_decoder_trained:
        untrained = "the semantic decoder was not trained; train the tokenizer with a teacher"
        reasons |= {metric: untrained for metric in _SEMANTIC if metric in others}
    return {metric: reasons[metric] for metric in others}


def lacking_metrics(wanted: Sequence[str], options: EvaluationOptions, source: ImageSource) -> dict[str, str]:
    """Metrics that cannot be measured, with the reason and the remedy."""
    lacking = {}
    if options.teacher is None:
        lacking["cosine"] = "it compares features with a teacher's; pass --teacher FOLDER"
    if options.classifier is None:
        lacking["zero_shot"] = (
            "it classifies by the names of classes, with the text tower of the teacher; pass --teacher FOLDER with a "
            "complete SigLIP and its tokenizer"
        )
    if len(source) < 2:
        lacking["rfid"] = f"it needs at least 2 images, {source.name!r} has {len(source)}"
    if {"probes", "zero_shot"} & set(wanted):
        labels = [source.label(index) for index in probes.probed_images(len(source))]
        found = {label for label in labels if label is not None}
        origin = "labels are the names of the images' folders, .cls files in shards, or a column `label`"
        if not probes.in_classes(labels).any():
            lacking["probes"] = f"{source.name!r} needs at least 2 classes of at least 2 images each; {origin}"
        if "zero_shot" not in lacking and len(found) < 2:
            lacking["zero_shot"] = f"{source.name!r} needs at least 2 classes; {origin}"
        elif "zero_shot" not in lacking and (ids := unnamed(found, options.class_names)):
            lacking["zero_shot"] = f"class {ids[0]!r} has no name in words; pass --class_names FILE.json"
    return {metric: reason for metric, reason in lacking.items() if metric in wanted}
