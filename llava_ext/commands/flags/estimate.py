"""Flags of `evotok-llava estimate`."""

import argparse

from evotok_plugin.common.command_line import deferred
from evotok_plugin.common.command_parser import examples_of
from evotok_plugin.common.recipes import recipe_help
from llava_ext.commands.options import SharedOptions


def add(commands: argparse._SubParsersAction, shared: SharedOptions) -> None:
    parser = commands.add_parser(
        "estimate",
        epilog=examples_of(
            "evotok-llava estimate --recipe paper --gpus 8 --samples 558000",
            "evotok-llava estimate --recipe paper_finetune_lora --gpus 2 --samples 665000 --model_max_length 4096",
            text="All other flags of the stage of the recipe are accepted as well, see `evotok-llava finetune --help`.",
        ),
    )
    parser.add_argument("--recipe", required=True, help=recipe_help("llava_ext"))
    parser.add_argument("--gpus", type=int, default=1, help="number of GPUs, with one process each")
    parser.add_argument("--samples", type=int, help="samples of an epoch, for the hours of a run without max_steps")
    parser.add_argument(
        "--mean_steps", type=float, help="mean LLM steps of a sample (default: an image and 128 text tokens)"
    )
    parser.add_argument("--drawn_share", type=float, default=0.5, help="share of the samples that draw")
    parser.set_defaults(run=deferred("llava_ext.commands.estimate"), takes_rest=True)
