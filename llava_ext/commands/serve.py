"""`evotok-llava serve`: a server with the interface of OpenAI's API."""

import argparse
import os

from evotok_plugin.common.command_parser import examples_of
from evotok_plugin.errors import UserError
from llava_ext.commands.options import SharedOptions, open_selected_model


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
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Serve a model until Ctrl-C.

    Raises:
        UserError: FastAPI or uvicorn is not installed, a limit is below 1, the model cannot be opened, or the address
            cannot be used.
    """
    try:
        from llava_ext.serving.api.requests import ApiLimits
        from llava_ext.serving.api.server import serve
    except ImportError as error:
        raise UserError(f"the server needs FastAPI and uvicorn ({error}): pip install 'evotok[serve]'") from error
    from llava_ext.serving.uploads import UploadLimits

    if arguments.folder is not None:
        if arguments.model is not None:
            raise UserError(
                f"expected one model, got {arguments.folder} and --model {arguments.model}; omit one of them"
            )
        arguments.model = arguments.folder
    for name in ("max_rows", "max_waiting", "max_new_tokens"):
        if getattr(arguments, name) < 1:
            raise UserError(f"{name} must be at least 1, got {getattr(arguments, name)}")
    limits = ApiLimits(
        UploadLimits(arguments.max_upload_mb, arguments.max_pixels),
        max_body_mb=max(1.0, 3 * arguments.max_upload_mb),
        max_new_tokens=arguments.max_new_tokens,
        max_rows=arguments.max_rows,
        max_waiting=arguments.max_waiting,
    )
    token = arguments.api_key or os.environ.get("EVOTOK_API_KEY") or None
    serve(open_selected_model(arguments), limits, arguments.host, arguments.port, token)
