"""Options that several commands share."""

import argparse
from dataclasses import dataclass

from evotok_plugin.errors import UserError
from evotok_plugin.image_processing_evotok import EvoTokImageProcessor
from evotok_plugin.modeling_evotok import EvoTokModel


@dataclass(frozen=True)
class SharedOptions:
    """Parent parsers: `model` (--model, --device), `counting` (--max_bad_fraction) and `sizing` (--size)."""

    model: argparse.ArgumentParser
    counting: argparse.ArgumentParser
    sizing: argparse.ArgumentParser


def shared_options() -> SharedOptions:
    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("--model", help="tokenizer folder (default: the newest of this working folder's outputs)")
    model.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    counting = argparse.ArgumentParser(add_help=False)
    counting.add_argument("--max_bad_fraction", type=float, default=0.001, help="share of broken images tolerated")
    sizing = argparse.ArgumentParser(add_help=False)
    sizing.add_argument(
        "--size", type=int, help="pixels a side, a multiple of the patch size (default: what the model was trained on)"
    )
    return SharedOptions(model, counting, sizing)


def at_size(processor: EvoTokImageProcessor, model: EvoTokModel, size: int | None) -> EvoTokImageProcessor:
    """The processor for images of `size` x `size` pixels; None leaves it as it is.

    Raises:
        UserError: the size is no multiple of the patch size.
    """
    if size is None:
        return processor
    patch = model.config.patch_size
    if size < patch or size % patch:
        raise UserError(f"--size must be a multiple of the patch size {patch}, got {size}")
    return EvoTokImageProcessor(size=size)
