"""Flags of `evotok-llava data draw`."""

import argparse
from pathlib import Path

from evotok_plugin.common.command_line import deferred
from evotok_plugin.common.command_parser import examples_of
from llava_ext.commands.options import SharedOptions

_EXAMPLE = "evotok-llava data draw llava_v1_5_mix665k.json -o mix665k_draw.json"


def add(commands: argparse._SubParsersAction, shared: SharedOptions) -> None:
    parser = commands.add_parser("data", epilog=examples_of(_EXAMPLE))
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION", title="actions")
    draw = actions.add_parser(
        "draw",
        help="add a sample that draws the image to every conversation that only describes it",
        description="Copy records and add a sample that draws the image to every conversation that only describes it. "
        "The rule is that of the training setting draw_share, which does the same without a new file.",
        epilog=examples_of(_EXAMPLE, f"{_EXAMPLE} --share 0.5 --only"),
    )
    draw.add_argument("file", metavar="IN", help="LLaVA's records: .json, .jsonl, or a pattern")
    draw.add_argument("-o", "--output", type=Path, required=True, help="new .json or .jsonl file")
    draw.add_argument("--share", type=float, default=1.0, help="share of the descriptions to draw, 0 to 1")
    draw.add_argument("--only", action="store_true", help="write only the drawing samples")
    draw.set_defaults(run=deferred("llava_ext.commands.data"))
