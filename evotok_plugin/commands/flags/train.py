"""Flags of `evotok train`."""

import argparse

from evotok_plugin.commands.options import SharedOptions
from evotok_plugin.common.command_line import deferred
from evotok_plugin.common.command_parser import examples_of
from evotok_plugin.common.recipes import add_arguments, recipe_help
from evotok_plugin.training.config import TokenizerTrainingConfig


def add(commands: argparse._SubParsersAction, shared: SharedOptions) -> None:
    parser = commands.add_parser(
        "train",
        epilog=examples_of(
            "evotok train --recipe photos --data photos --output_dir outputs/evotok",
            "torchrun --standalone --nproc_per_node 8 -m evotok_plugin.cli train --recipe paper "
            "--data imagenet/train --teacher siglip2 --output_dir outputs/evotok",
            text="A recipe overrides the defaults, and flags override the recipe. Interruptible: rerun the same "
            "command to resume.",
        ),
    )
    parser.add_argument("--recipe", help=recipe_help("evotok_plugin"))
    add_arguments(parser, TokenizerTrainingConfig)
    parser.set_defaults(run=deferred("evotok_plugin.commands.train"))
