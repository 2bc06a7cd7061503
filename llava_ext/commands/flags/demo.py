"""Flags of `evotok-llava demo`."""

import argparse

from evotok_plugin.common.command_line import deferred
from evotok_plugin.common.command_parser import examples_of
from llava_ext.commands.options import SharedOptions


def add(commands: argparse._SubParsersAction, shared: SharedOptions) -> None:
    parser = commands.add_parser(
        "demo",
        parents=[shared.model],
        epilog=examples_of(
            "evotok-llava demo                              # the newest model of outputs/, or the included one",
            "evotok-llava demo --model outputs/finetune --port 8080",
            text="By default only this machine can open the page; with --host, anyone who can reach it can use it.",
        ),
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine only)")
    parser.add_argument("--port", type=int, default=7860, help="port to listen on")
    parser.add_argument("--max_upload_mb", type=float, default=10.0, help="largest image file that is accepted, in MB")
    parser.add_argument("--max_pixels", type=int, default=16_000_000, help="largest image that is accepted, in pixels")
    parser.add_argument(
        "--max_total_mb", type=float, default=1024.0, help="size of all files of the page together, in MB"
    )
    parser.add_argument(
        "--teacher", help="SigLIP folder: the evolution tab compares features with those of this teacher"
    )
    parser.set_defaults(run=deferred("llava_ext.commands.demo"))
