"""Start the API's server."""

import socket
import sys

import uvicorn

from evotok_plugin.errors import UserError
from llava_ext.model_folder import OpenModel
from llava_ext.serving.api.app import build_app
from llava_ext.serving.api.guard import ApiGuard
from llava_ext.serving.api.requests import ApiLimits
from llava_ext.serving.slow_clients import limit_slow_clients

_THIS_MACHINE = ("127.0.0.1", "localhost", "::1")
_SECONDS_TO_FINISH = 30  # for answers in progress, after Ctrl-C or SIGTERM


def make_server(opened: OpenModel, limits: ApiLimits, host: str, port: int, token: str | None) -> uvicorn.Server:
    """A server that is not running yet."""
    app = ApiGuard(build_app(opened, limits), token, int(limits.max_body_mb * 2**20))
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=_SECONDS_TO_FINISH,
    )
    server = uvicorn.Server(config)
    config.load()
    limit_slow_clients(server, limits.max_connections)
    return server


def listen(host: str, port: int) -> socket.socket:
    """Open the socket of a server, whose connections send small packets at once.

    Raises:
        UserError: the address cannot be used.
    """
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen on {host}:{port}: {error}; choose another --host or --port") from error
    # Connections inherit this. asyncio sets it only for sockets that were created with the number of their protocol;
    # without it the body of a response waits until the client has acknowledged the headers, often for 40 ms.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def serve(opened: OpenModel, limits: ApiLimits, host: str, port: int, token: str | None = None) -> None:
    """Serve a model until Ctrl-C or SIGTERM.

    Args:
        token: what clients must send as `Authorization: Bearer`; None for no check.

    Raises:
        UserError: the address cannot be used.
    """
    server = make_server(opened, limits, host, port, token)
    if host not in _THIS_MACHINE and token is None:
        print(
            "warning: everyone who can reach this address can use the model; --api_key asks for a token",
            file=sys.stderr,
        )
    listening = listen(host, port)
    address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}/v1"
    print(f"serving {opened.name} at {address}; Ctrl-C stops", file=sys.stderr, flush=True)
    server.run(sockets=[listening])
