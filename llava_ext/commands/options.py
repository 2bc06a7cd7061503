"""Flags that several commands share: the model and the settings of drawing."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from llava_ext.generation.options import SCHEDULES, DrawingOptions

if TYPE_CHECKING:
    from llava_ext.model_folder import OpenModel

DTYPES = ("float32", "bfloat16", "float16")
_OF_THE_MODEL = " (default: the model's)"


@dataclass(frozen=True)
class SharedOptions:
    """Parent parsers: `model` (--model, --device, --dtype) and `drawing` (--guidance_scale, --temperature, ...)."""

    model: argparse.ArgumentParser
    drawing: argparse.ArgumentParser


def shared_options() -> SharedOptions:
    """Build the parent parsers; every command needs its own copy."""
    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("--model", help="model folder (default: the newest in outputs/, or the included model)")
    model.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    model.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="dtype of the weights, except those of the tokenizer; auto: as stored on a GPU, float32 on a CPU",
    )
    drawing = argparse.ArgumentParser(add_help=False)
    group = drawing.add_argument_group(
        "drawing",
        "NUMBER is one value for all levels or one per level: 1,0.9,0.8,0.7. The defaults are the model's settings "
        "(image_generation in its generation_config.json).",
    )
    group.add_argument("--seed", type=int, default=0, help="seed of the first image; each further image adds 1")
    group.add_argument(
        "--guidance_scale",
        type=_numbers(float),
        metavar="NUMBER",
        help="how closely images follow the prompt; 1 turns guidance off" + _OF_THE_MODEL,
    )
    group.add_argument(
        "--guidance_schedule", choices=SCHEDULES, help="schedule of the guidance scale over the image" + _OF_THE_MODEL
    )
    group.add_argument(
        "--guidance_interval",
        type=_numbers(float),
        metavar="START,END",
        help="guide only between these fractions of the positions: 0,0.5 is the first half; 0,1 the whole image"
        + _OF_THE_MODEL,
    )
    group.add_argument(
        "--guidance_rescale",
        type=float,
        metavar="SHARE",
        help="share of the guided logits that keeps the standard deviation of unguided ones, 0 to 1; 0: off"
        + _OF_THE_MODEL,
    )
    group.add_argument(
        "--negative_prompt", metavar="TEXT", help="prompt that guidance steers away from" + _OF_THE_MODEL
    )
    for name, kind, explanation in (
        ("temperature", float, "0 always picks the most likely code"),
        ("top_k", int, "sample from the k most likely codes; 0: all"),
        ("top_p", float, "sample from the most likely codes that reach this total probability; 1: all"),
        ("min_p", float, "drop codes below this fraction of the highest probability; 0: none"),
    ):
        group.add_argument(f"--{name}", type=_numbers(kind), metavar="NUMBER", help=explanation + _OF_THE_MODEL)
    group.add_argument(
        "--scale",
        type=int,
        metavar="N",
        help="image files show images enlarged N times, pixel by pixel; 1: raw size (default: 256 pixels wide or more)",
    )
    return SharedOptions(model, drawing)


def _numbers(kind: type) -> Callable[[str], float | tuple[float, ...]]:
    """Build a parser of flag values: one number, or several separated by commas."""

    def number(text: str) -> float | tuple[float, ...]:  # argparse names this function in errors
        values = tuple(kind(part) for part in text.split(","))
        return values[0] if len(values) == 1 else values

    return number


def drawing_options(arguments: argparse.Namespace) -> DrawingOptions:
    """Collect the drawing flags; the ones that were not given are None and leave the setting to the model.

    Raises:
        UserError: a value is out of its range.
    """
    return DrawingOptions(**{field.name: getattr(arguments, field.name, None) for field in fields(DrawingOptions)})


def open_selected_model(arguments: argparse.Namespace) -> "OpenModel":
    """Open the model that --model selects on --device with the weights of --dtype, and report its folder on stderr.

    Raises:
        UserError: the model does not exist or cannot be read, or the device is not available.
    """
    import torch  # slow imports, which flags do not need

    from evotok_plugin.common.processes import resolve_device
    from llava_ext.model_folder import default_model_folder, open_model

    folder = arguments.model or default_model_folder()
    print(f"model: {folder}", file=sys.stderr)
    device = resolve_device(arguments.device)
    dtype = arguments.dtype
    if dtype == "auto" and device.type == "cpu":
        dtype = "float32"
    return open_model(folder, device, dtype if dtype == "auto" else getattr(torch, dtype))
