"""Flags of `evotok convert`."""

import argparse

from evotok_plugin.commands.options import SharedOptions
from evotok_plugin.common.command_line import deferred
from evotok_plugin.common.command_parser import examples_of
from evotok_plugin.common.recipes import add_arguments
from evotok_plugin.conversion.options import TokenizerOptions


def add(commands: argparse._SubParsersAction, shared: SharedOptions) -> None:
    parser = commands.add_parser("convert", epilog=examples_of("evotok convert evotok_tokenizer.pt outputs/evotok"))
    parser.add_argument("checkpoint", help="pickled checkpoint; no code in it is run")
    parser.add_argument(
        "output",
        help="new folder for the model; NAME.safetensors: only rewrite the weights, of any network, as safetensors",
    )
    add_arguments(parser, TokenizerOptions)
    parser.set_defaults(run=deferred("evotok_plugin.commands.convert"))
