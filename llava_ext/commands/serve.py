"""`evotok-llava serve`: a server with the interface of OpenAI's API."""

import argparse
import os

from evotok_plugin.errors import UserError
from llava_ext.commands.options import open_selected_model


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
