"""Flags of `evotok-llava chat`."""

import argparse
from pathlib import Path

from evotok_plugin.common.command_line import deferred
from evotok_plugin.common.command_parser import examples_of
from llava_ext.commands.options import SharedOptions


def add(commands: argparse._SubParsersAction, shared: SharedOptions) -> None:
    parser = commands.add_parser(
        "chat",
        parents=[shared.model, shared.drawing],
        epilog=examples_of(
            "evotok-llava chat                              # a conversation; /help lists its commands",
            'evotok-llava chat --image photo.png "How many objects are there?"',
            "evotok-llava chat --model outputs/finetune --best_of 4 -o drawn",
        ),
    )
    parser.add_argument("question", nargs="?", help="a single question; without it, an interactive chat starts")
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="image file; can be given several times"
    )
    parser.add_argument("--max_new_tokens", type=int, help="text tokens per answer (default: the model's, or 256)")
    parser.add_argument("--max_images", type=int, default=4, help="images per answer")
    parser.add_argument(
        "--best_of", type=int, default=1, metavar="N", help="candidates of /draw, of which the best one is kept"
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("out"), help="folder for drawn images")
    parser.set_defaults(run=deferred("llava_ext.commands.chat"))
