"""Flags of `evotok-llava serve`."""

import argparse

from evotok_plugin.common.command_line import deferred
from evotok_plugin.common.command_parser import examples_of
from llava_ext.commands.options import SharedOptions


def add(commands: argparse._SubParsersAction, shared: SharedOptions) -> None:
    parser = commands.add_parser(
        "serve",
        parents=[shared.model],
        epilog=examples_of(
            "evotok-llava serve                             # the newest model of outputs/, or the included one",
            "evotok-llava serve outputs/finetune --port 8001 --api_key secret",
            "curl -s localhost:8000/v1/images/generations -H 'Content-Type: application/json' "
            '-d \'{"prompt": "a red circle"}\'',
            text="By default only this machine can connect. With --host 0.0.0.0 anyone who can reach the address can: "
            "set --api_key.",
        ),
    )
    parser.add_argument("folder", nargs="?", metavar="FOLDER", help="the model, instead of --model")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on; 0 chooses a free one")
    parser.add_argument(
        "--api_key", help="token that clients must send (default: EVOTOK_API_KEY; without either, none is needed)"
    )
    parser.add_argument("--max_rows", type=int, default=16, help="answers and candidates generated together")
    parser.add_argument(
        "--max_waiting", type=int, default=64, help="requests that can wait for the model, others get 429"
    )
    parser.add_argument("--max_new_tokens", type=int, default=1024, help="largest max_tokens of a request")
    parser.add_argument("--max_upload_mb", type=float, default=10.0, help="largest image that is accepted, in MB")
    parser.add_argument("--max_pixels", type=int, default=16_000_000, help="largest image, in pixels")
    parser.set_defaults(run=deferred("llava_ext.commands.serve"))
