"""What stands between the page and the network: small requests, files that were uploaded, nothing from elsewhere."""

import json
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from typing import Any

_MAX_BODY = 2**18  # bytes of a request that is no upload; a message of the largest length takes a tenth
_POLICY = (
    "default-src 'self' blob: data:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
_MARK = {"_type": "gradio.FileData"}
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

    The browser is told to load nothing from other servers. Requests that are no uploads must be small, and may name no
    file by a URL or hold it as base64: the server would fetch the one and decode the other, past the upload's limits.
    """

    def __init__(self, app: Callable) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *_HEADERS]}
            await send(message)

        if scope["method"] in ("POST", "PUT", "PATCH") and not scope["path"].rstrip("/").endswith("/upload"):
            body = await _read(receive)
            if body is None:
                await _refuse(send_guarded, 413, f"a request may have {_MAX_BODY} bytes")
                return
            if _names_a_foreign_file(body):
                await _refuse(send_guarded, 400, "files are uploaded, not named by a URL")
                return
            receive = _replay(body, receive)
        await self.app(scope, receive, send_guarded)


async def _read(receive: Receive) -> bytes | None:
    """A request's body; None where it is too long, or its sender is gone."""
    body, more = bytearray(), True
    while more:
        message = await receive()
        body += message.get("body", b"")
        if message["type"] != "http.request" or len(body) > _MAX_BODY:
            return None
        more = message.get("more_body", False)
    return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Give the body that was read already, then what comes."""
    first = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return first.pop() if first else await receive()

    return again


def _names_a_foreign_file(body: bytes) -> bool:
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        return False  # no JSON: the server refuses it, or it names no file
    return any(
        str(file.get("path", "")).lower().startswith(("http:", "https:", "data:"))
        or str(file.get("url", "")).lower().startswith("data:")
        or ("path" in file and file.get("meta") != _MARK)  # without it the server does not look where the file lies
        for file in _files(values)
    )


def _files(values: Any) -> Iterator[dict]:
    """Every mapping with a path or URL, however deep."""
    waiting = [values]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if "path" in value or "url" in value:
                yield value
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


async def _refuse(send: Send, status: int, reason: str) -> None:
    body = json.dumps({"detail": reason, "error": reason}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
