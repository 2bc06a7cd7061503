"""`evotok export-tower`: write the vision tower with its own code."""

import argparse

from evotok_plugin.commands.options import SharedOptions
from evotok_plugin.common.command_parser import examples_of
from evotok_plugin.common.files import check_output_folder
from evotok_plugin.common.folders import check_new_folder
from evotok_plugin.export.tower import export_tower


def add(commands: argparse._SubParsersAction, shared: SharedOptions) -> None:
    parser = commands.add_parser("export-tower", epilog=examples_of("evotok export-tower outputs/evotok -o tower"))
    parser.add_argument("folder", help="a tokenizer, or a model that contains one")
    parser.add_argument("-o", "--output", required=True, help="new folder")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Write a folder that transformers opens with `trust_remote_code=True`."""
    check_output_folder(arguments.output)
    check_new_folder(arguments.output)
    export_tower(arguments.folder, arguments.output)
    print(arguments.output)
