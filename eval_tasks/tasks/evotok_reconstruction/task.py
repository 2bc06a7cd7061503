"""The task `evotok_reconstruction`: a model's tokenizer on a folder of images, measured as by `evotok evaluate`.

The model adapter runs the measurement, since it holds the tokenizer: the request is the folder, the answer all figures
as JSON. Every process gets the request and measures its share of the images; the first process returns the answer.
"""

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import datasets
import numpy as np

from evotok_plugin.common.files import write_text, write_whole, writing
from evotok_plugin.common.processes import Processes
from evotok_plugin.data.sources import ImageSource, Subset, open_sources
from evotok_plugin.errors import UserError
from evotok_plugin.losses.perceptual import load_lpips
from evotok_plugin.metrics.inception import load_inception

if TYPE_CHECKING:
    from evotok_plugin import EvoTokImageProcessor, EvoTokModel

logger = logging.getLogger(__name__)

IMAGES_VARIABLE = "EVOTOK_RECONSTRUCTION_IMAGES"
LIMIT_VARIABLE = "EVOTOK_RECONSTRUCTION_LIMIT"  # lmms-eval's --limit counts documents, and the folder is one
_METRICS = ("rfid", "psnr", "ssim", "lpips")


def images_source() -> ImageSource:
    """The images to reconstruct: the first EVOTOK_RECONSTRUCTION_LIMIT of EVOTOK_RECONSTRUCTION_IMAGES.

    Raises:
        UserError: no folder is set, the folder has no images, or the limit is invalid.
    """
    folder, limit = os.environ.get(IMAGES_VARIABLE), os.environ.get(LIMIT_VARIABLE, "")
    if not folder:
        raise UserError(f"evotok_reconstruction reconstructs the images of a folder: set {IMAGES_VARIABLE}=FOLDER")
    source = open_sources([folder])
    if not limit:
        return source
    if not limit.isdigit() or int(limit) < 1:
        raise UserError(f"{LIMIT_VARIABLE} must be a number of at least 1, got {limit!r}")
    return Subset(source, np.arange(min(int(limit), len(source))))


def process_docs(rows: datasets.Dataset) -> datasets.Dataset:
    """One document per process with the name of the images; they are located now, before the model runs."""
    name, num_processes = images_source().name, int(os.environ.get("WORLD_SIZE", "1"))
    return datasets.Dataset.from_list([{"images": name, "process": number} for number in range(num_processes)])


def measure(
    tokenizer: "EvoTokModel", processor: "EvoTokImageProcessor", output: Path, processes: Processes | None = None
) -> str:
    """Reconstruct the images and measure the result.

    Args:
        tokenizer: in eval mode, the same in every process.
        output: folder for `metrics.json`, `metrics.md`, `grid.png` and, if images are broken, `bad_samples.jsonl`.

    Returns:
        The answer to the task's request: JSON with the figures of `evotok evaluate`, and `left_out` with the reasons
        for omitted metrics. Empty in all processes but the first.

    Raises:
        UserError: too many broken images, or the folder cannot be written to.
    """
    from evotok_plugin.evaluation.evaluate import evaluate
    from evotok_plugin.evaluation.options import EvaluationOptions

    source, processes = images_source(), processes or Processes(0, 1, tokenizer.device)
    left_out = processes.gather(_left_out(len(source)) if processes.is_first else {})[0]
    for metric, reason in left_out.items():
        logger.warning("evotok_reconstruction leaves %s out: %s", metric, reason)
    metrics = [metric for metric in (*_METRICS, "usage") if metric not in left_out]
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
    options = EvaluationOptions(metrics=metrics, report=output / "bad_samples.jsonl")
    evaluation = evaluate(tokenizer, processor, source, options, processes)
    if evaluation is None:
        return ""
    write_text(output / "metrics.json", evaluation.as_json(), shared=True)
    write_text(output / "metrics.md", evaluation.as_markdown(), shared=True)
    grid = evaluation.grid()
    write_whole(output / "grid.png", lambda part: grid.save(part, "PNG"), shared=True)
    return json.dumps({**evaluation.values, "left_out": left_out})


def _left_out(num_images: int) -> dict[str, str]:
    """The metrics that cannot be measured, with reasons; no substitutes for published weights are used."""
    left_out = {}
    if num_images < 2:
        left_out["rfid"] = "it needs at least 2 images"
    for metric, load in (("rfid", load_inception), ("lpips", load_lpips)):
        try:
            load()
        except UserError as error:
            left_out.setdefault(metric, str(error))
    return left_out


def _about(values: dict) -> dict[str, int]:
    """The facts that figures must share to be comparable."""
    return {"num_images": values["images"], "image_size": values["image_size"]}


def process_results(doc: dict, results: Sequence[str]) -> dict[str, float]:
    """The measured figures, with the mean of code usage over levels; empty for all processes but the first.

    Raises:
        UserError: the answer comes from a model without a tokenizer.
    """
    if doc["process"]:
        return {}
    try:
        values = json.loads(results[0])
        figures = {metric: values[metric] for metric in _METRICS if metric in values}
        return {**figures, "code_usage": float(np.mean(values["code_usage"])), **_about(values)}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"evotok_reconstruction needs `--model evotok`, whose tokenizer it measures; got {results[0][:80]!r}"
        ) from error
