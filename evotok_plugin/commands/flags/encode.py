"""Flags of `evotok encode`."""

import argparse

from evotok_plugin.commands.options import SharedOptions
from evotok_plugin.common.command_line import deferred
from evotok_plugin.common.command_parser import examples_of
from evotok_plugin.data.encoding_options import EncodingOptions


def add(commands: argparse._SubParsersAction, shared: SharedOptions) -> None:
    parser = commands.add_parser(
        "encode",
        parents=[shared.model, shared.counting, shared.sizing],
        epilog=examples_of(
            "evotok encode photos -o codes                  # rerun it to resume, or to add new images",
            "evotok encode photos -o codes --verify",
            "evotok encode hf:NAME data/*.tar --model outputs/evotok",
        ),
    )
    defaults = EncodingOptions()
    parser.add_argument("source", nargs="*", help="images, folders, tar shards, parquet or hf:NAME")
    parser.add_argument("-o", "--output", default="codes", help="folder of the cache")
    parser.add_argument("--shard_size", type=int, default=defaults.shard_size, help="images per file")
    parser.add_argument("--batch_size", type=int, default=defaults.batch_size, help="images per batch")
    parser.add_argument("--num_workers", type=int, default=defaults.num_workers, help="processes that decode images")
    parser.add_argument("--retry_broken", action="store_true", help="also retry unreadable images that are unchanged")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="recompute all checksums, and compare the images of the source with those that were encoded",
    )
    parser.set_defaults(run=deferred("evotok_plugin.commands.encode"))
