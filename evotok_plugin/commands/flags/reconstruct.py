"""Flags of `evotok reconstruct`."""

import argparse

from evotok_plugin.commands.options import SharedOptions
from evotok_plugin.common.command_line import deferred
from evotok_plugin.common.command_parser import examples_of


def add(commands: argparse._SubParsersAction, shared: SharedOptions) -> None:
    parser = commands.add_parser(
        "reconstruct",
        parents=[shared.model, shared.sizing],
        epilog=examples_of("evotok reconstruct photos", "evotok reconstruct photo.png --depth 1 -o first_level.png"),
    )
    parser.add_argument("source", nargs="+", help="images, folders, tar shards, parquet or hf:NAME")
    parser.add_argument("-o", "--output", default="reconstruction.png", help="picture to write")
    parser.add_argument("--depth", type=int, help="number of levels to sum (default: the model's pixel_depth)")
    parser.set_defaults(run=deferred("evotok_plugin.commands.reconstruct"))
