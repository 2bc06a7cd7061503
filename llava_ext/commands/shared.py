"""What several commands have in common: options, opening a model, settings of drawing."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from evotok_plugin.processes import resolve_device
from evotok_plugin.sampling import SamplingOptions
from llava_ext.checkpointing import default_model_folder, load_model, weights_fingerprint
from llava_ext.generation.options import SCHEDULES, DrawingOptions
from llava_ext.modeling_evotok_llava import EvoTokLlavaForConditionalGeneration
from llava_ext.processing_evotok_llava import EvoTokLlavaProcessor


@dataclass(frozen=True)
class SharedOptions:
    """Parent parsers: `model` (--model, --device) and `drawing` (--guidance_scale, --temperature, ...)."""

    model: argparse.ArgumentParser
    drawing: argparse.ArgumentParser


def shared_options() -> SharedOptions:
    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("--model", help="model folder (default: the newest of this working folder's outputs)")
    model.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    drawing = argparse.ArgumentParser(add_help=False)
    group = drawing.add_argument_group("drawing", "NUMBER is one for all levels, or one a level: 1,0.9,0.8,0.7")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--guidance_scale", type=float, default=3.0, help="how closely a prompt is followed; 1: freely")
    group.add_argument(
        "--guidance_schedule", choices=SCHEDULES, default="constant", help="how guidance goes on over the image"
    )
    group.add_argument("--negative_prompt", default="", metavar="TEXT", help="what guidance leads away from")
    for name, kind, default, what in (
        ("temperature", float, 1.0, "0 takes the most likely code"),
        ("top_k", int, 0, "only the so many most likely codes; 0: all"),
        ("top_p", float, 1.0, "only the most likely codes that make up this share; 1: all"),
        ("min_p", float, 0.0, "only codes at least so likely, beside the most likely one; 0: all"),
    ):
        group.add_argument(f"--{name}", type=_numbers(kind), default=default, metavar="NUMBER", help=what)
    return SharedOptions(model, drawing)


def _numbers(kind: type) -> Callable[[str], float | tuple[float, ...]]:
    """A reader of flags: a number, or several between commas."""

    def number(text: str) -> float | tuple[float, ...]:
        values = tuple(kind(part) for part in text.split(","))
        return values[0] if len(values) == 1 else values

    return number


@dataclass(frozen=True)
class OpenModel:
    """A model on its device, in evaluation mode, and its processor; `name` is its folder's, without the path, `weights`
    the fingerprint of what is in it."""

    model: EvoTokLlavaForConditionalGeneration
    processor: EvoTokLlavaProcessor
    name: str
    weights: str


def open_model(arguments: argparse.Namespace) -> OpenModel:
    """Open what --model and --device name.

    Raises:
        ValueError: no such model, or no such device.
    """
    folder = Path(arguments.model or default_model_folder())
    device = resolve_device(arguments.device)
    print(f"model: {folder}", file=sys.stderr)
    model, processor = load_model(folder)
    return OpenModel(model.to(device).eval(), processor, folder.resolve().name, weights_fingerprint(folder))


def drawing_options(arguments: argparse.Namespace) -> DrawingOptions:
    """What the flags of drawing say.

    Raises:
        ValueError: a value that none may have.
    """
    sampling = SamplingOptions(*(getattr(arguments, field.name) for field in fields(SamplingOptions)))
    return DrawingOptions(
        arguments.guidance_scale, arguments.guidance_schedule, arguments.negative_prompt, sampling=sampling
    )


def settings_of(options: DrawingOptions) -> dict:
    """The options as one flat mapping, by the names that `generate_images` gives them."""
    values = asdict(options)
    sampling = values.pop("sampling")
    return values | sampling
