"""Flags of `evotok export-tower`."""

import argparse

from evotok_plugin.commands.options import SharedOptions
from evotok_plugin.common.command_line import deferred
from evotok_plugin.common.command_parser import examples_of


def add(commands: argparse._SubParsersAction, shared: SharedOptions) -> None:
    parser = commands.add_parser("export-tower", epilog=examples_of("evotok export-tower outputs/evotok -o tower"))
    parser.add_argument("folder", help="a tokenizer, or a model that contains one")
    parser.add_argument("-o", "--output", required=True, help="new folder")
    parser.set_defaults(run=deferred("evotok_plugin.commands.export_tower"))
