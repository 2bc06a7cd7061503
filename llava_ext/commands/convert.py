"""`evotok-llava convert`: convert research adapters to a model folder."""

import argparse

import torch

from evotok_plugin.common.files import check_output_folder
from evotok_plugin.common.folders import check_new_folder
from evotok_plugin.common.recipes import load_recipe
from llava_ext.conversion import convert_adapters
from llava_ext.conversion_options import HeadOptions


def run(arguments: argparse.Namespace) -> None:
    """Assemble a model from a causal LM, a converted tokenizer and research adapters."""
    check_output_folder(arguments.output)
    check_new_folder(arguments.output)
    given = {k: v for k, v in vars(arguments).items() if k.startswith("head_")}
    converted = convert_adapters(
        arguments.file,
        arguments.language_model,
        arguments.vision_tower,
        arguments.output,
        load_recipe(None, HeadOptions, given),
        dtype=getattr(torch, arguments.dtype),
    )
    for part, file in converted.parts.items():
        print(f"{part}: {file}")
    for part in converted.random:
        print(f"{part}: no file given, initialized at random")
    for reason, count in converted.bookkeeping.items():
        print(f"left out: {count} keys, {reason}")
    print(arguments.output)
