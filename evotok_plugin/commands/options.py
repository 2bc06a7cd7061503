"""Options that several commands share."""

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING

from evotok_plugin.errors import UserError

if TYPE_CHECKING:
    from evotok_plugin.image_processing_evotok import EvoTokImageProcessor
    from evotok_plugin.modeling_evotok import EvoTokModel


@dataclass(frozen=True)
class SharedOptions:
    """Parent parsers: `model` (--model, --device), `counting` (--max_bad_fraction) and `sizing` (--size)."""

    model: argparse.ArgumentParser
    counting: argparse.ArgumentParser
    sizing: argparse.ArgumentParser


def shared_options() -> SharedOptions:
    """New parent parsers for one command."""
    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("--model", help="tokenizer folder (default: outputs/evotok, or else outputs/quickstart/evotok)")
    model.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    counting = argparse.ArgumentParser(add_help=False)
    counting.add_argument("--max_bad_fraction", type=float, default=0.001, help="tolerated fraction of broken images")
    sizing = argparse.ArgumentParser(add_help=False)
    sizing.add_argument(
        "--size", type=int, help="pixels per side, a multiple of the patch size (default: the training size)"
    )
    return SharedOptions(model, counting, sizing)


def at_size(processor: "EvoTokImageProcessor", model: "EvoTokModel", size: int | None) -> "EvoTokImageProcessor":
    """The processor for images of `size` x `size` pixels; None returns `processor` itself.

    Raises:
        UserError: the size is not a multiple of the patch size.
    """
    if size is None:
        return processor
    patch = model.config.patch_size
    if size < patch or size % patch:
        raise UserError(f"--size must be a multiple of the patch size {patch}, got {size}")
    from evotok_plugin.image_processing_evotok import EvoTokImageProcessor

    return EvoTokImageProcessor(size=size)
