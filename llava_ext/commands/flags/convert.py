"""Flags of `evotok-llava convert`."""

import argparse

from evotok_plugin.common.command_line import deferred
from evotok_plugin.common.command_parser import examples_of
from evotok_plugin.common.recipes import add_arguments
from llava_ext.commands.options import SharedOptions
from llava_ext.conversion_options import HeadOptions


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
    parser.set_defaults(run=deferred("llava_ext.commands.convert"))
