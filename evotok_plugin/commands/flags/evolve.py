"""Flags of `evotok evolve`."""

import argparse

from evotok_plugin.commands.options import SharedOptions
from evotok_plugin.common.command_line import deferred
from evotok_plugin.common.command_parser import examples_of


def add(commands: argparse._SubParsersAction, shared: SharedOptions) -> None:
    parser = commands.add_parser(
        "evolve",
        parents=[shared.model, shared.counting, shared.sizing],
        epilog=examples_of(
            "evotok evolve photos -o outputs/evolution",
            "evotok evolve imagenet/val --model outputs/evotok --teacher siglip2 --max_images 1000",
        ),
    )
    parser.add_argument("source", nargs="+", help="images, folders, tar shards, parquet or hf:NAME")
    parser.add_argument("-o", "--output", default="evolution", help="folder for pictures, plots and the CSV")
    parser.add_argument(
        "--teacher", help="also compare features with this teacher's: a folder, a hub id or timm:NAME[:FILE]"
    )
    parser.add_argument("--max_images", type=int, default=256, help="maximum number of images, evenly spread")
    parser.add_argument("--strips", type=int, default=4, help="number of images in the strips, from the first")
    parser.add_argument("--batch_size", type=int, default=32, help="images per batch")
    parser.add_argument(
        "--fit",
        action="store_true",
        help="fit linear decoders of pixels and teacher features, and with labels a probe, for every depth: fits.png",
    )
    parser.add_argument(
        "--fit_on",
        nargs="+",
        metavar="SOURCE",
        help="with --fit: images to fit to, for a probe in the same classes (default: the other half of the images)",
    )
    parser.set_defaults(run=deferred("evotok_plugin.commands.evolve"))
