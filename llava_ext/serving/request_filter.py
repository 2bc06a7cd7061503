"""Middleware between the network and the page: limits requests, and blocks content from other servers."""

import json
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from typing import Any

_MAX_BODY = 2**18  # bytes of a request that is not an upload; the longest message takes a tenth of this
_POLICY = (
    "default-src 'self' blob: data:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
_FILE_META = {"_type": "gradio.FileData"}  # gradio's mark of a file in a request
_HEADERS = (
    (b"content-security-policy", _POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class RequestFilter:
    """ASGI middleware around the page's server.

    Response headers forbid the browser to load content from other servers. Requests other than uploads must be small
    and must not contain files by URL or as base64: gradio would fetch or decode them without the limits of uploads.
    """

    def __init__(self, app: Callable) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *_HEADERS]}
            await send(message)

        if scope["method"] in ("POST", "PUT", "PATCH") and not scope["path"].rstrip("/").endswith("/upload"):
            body = await _read(receive)
            if body is None:
                await _reject(send_with_headers, 413, f"the request is larger than {_MAX_BODY} bytes")
                return
            if _has_foreign_file(body):
                await _reject(send_with_headers, 400, "files must be uploaded, not given by a URL")
                return
            receive = _replay(body, receive)
        await self.app(scope, receive, send_with_headers)


async def _read(receive: Receive) -> bytes | None:
    """Read a request's body; None if it is too large or the client has disconnected."""
    body, more = bytearray(), True
    while more:
        message = await receive()
        body += message.get("body", b"")
        if message["type"] != "http.request" or len(body) > _MAX_BODY:
            return None
        more = message.get("more_body", False)
    return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Create a `receive` that returns the body, which was read already, and then further messages."""
    first = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return first.pop() if first else await receive()

    return replay


def _has_foreign_file(body: bytes) -> bool:
    """Whether a request contains a file that was not uploaded."""
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        return False  # not JSON: the server rejects it, or it contains no file
    return any(
        str(file.get("path", "")).lower().startswith(("http:", "https:", "data:"))
        or str(file.get("url", "")).lower().startswith("data:")
        or ("path" in file and file.get("meta") != _FILE_META)  # without it, gradio does not check the path
        for file in _files(values)
    )


def _files(values: Any) -> Iterator[dict[str, Any]]:
    """Find every mapping with a path or URL, at any depth."""
    waiting = [values]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if "path" in value or "url" in value:
                yield value
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


async def _reject(send: Send, status: int, reason: str) -> None:
    body = json.dumps({"detail": reason, "error": reason}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
