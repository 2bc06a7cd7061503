"""What several commands have in common: options, opening a model, settings of drawing."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, fields

from llava_ext.generation.options import SCHEDULES, DrawingOptions


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
    group = drawing.add_argument_group(
        "drawing",
        "NUMBER is one for all levels, or one a level: 1,0.9,0.8,0.7. Settings that are not given are the model's own "
        "(image_generation in its generation_config.json).",
    )
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--guidance_scale", type=float, help="how closely a prompt is followed; 1: freely")
    group.add_argument("--guidance_schedule", choices=SCHEDULES, help="schedule of the guidance scale over the image")
    group.add_argument("--negative_prompt", metavar="TEXT", help="what guidance leads away from")
    for name, kind, what in (
        ("temperature", float, "0 takes the most likely code"),
        ("top_k", int, "only the so many most likely codes; 0: all"),
        ("top_p", float, "only the most likely codes that make up this share; 1: all"),
        ("min_p", float, "only codes at least so likely, beside the most likely one; 0: all"),
    ):
        group.add_argument(f"--{name}", type=_numbers(kind), metavar="NUMBER", help=what)
    return SharedOptions(model, drawing)


def _numbers(kind: type) -> Callable[[str], float | tuple[float, ...]]:
    """A reader of flags: a number, or several between commas."""

    def number(text: str) -> float | tuple[float, ...]:
        values = tuple(kind(part) for part in text.split(","))
        return values[0] if len(values) == 1 else values

    return number


def drawing_options(arguments: argparse.Namespace) -> DrawingOptions:
    """The flags of drawing; those that are not given are None, the model's own.

    Raises:
        UserError: a value out of its range.
    """
    return DrawingOptions(**{field.name: getattr(arguments, field.name, None) for field in fields(DrawingOptions)})
