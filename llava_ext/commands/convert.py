"""`evotok-llava convert`: convert research adapters to a model folder."""

import argparse

import torch

from evotok_plugin.common.command_parser import examples_of
from evotok_plugin.common.files import check_output_folder
from evotok_plugin.common.folders import check_new_folder
from evotok_plugin.common.recipes import add_arguments, load_recipe
from llava_ext.commands.options import SharedOptions
from llava_ext.conversion import HeadOptions, convert_adapters


def add(commands: argparse._SubParsersAction, shared: SharedOptions) -> None:
    parser = commands.add_parser(
        "convert",
        epilog=examples_of(
            "evotok-llava convert rqtransformer.bin mm_projector.bin --language_model Qwen2.5-7B-Instruct "
            "--vision_tower outputs/evotok -o outputs/converted"
        ),
    )
    parser.add_argument("file", nargs="+", help="rqtransformer.bin, mm_projector.bin (for reading, for drawing)")
    parser.add_argument("--language_model", required=True, help="the text model the adapters were trained for")
    parser.add_argument("--vision_tower", required=True, help="tokenizer folder, created by `evotok convert`")
    parser.add_argument("-o", "--output", required=True, help="new folder for the model")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="dtype of the weights")
    add_arguments(parser, HeadOptions)
    parser.set_defaults(run=run)


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
