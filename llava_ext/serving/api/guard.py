"""Middleware around the API: bearer token, size of requests, and no requests from web pages of other origins."""

import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from llava_ext.serving.request_filter import Rejected, check_origin

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

OPEN_PATHS = ("/health",)  # without a token
_KINDS = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error"}


def error_body(status: int, message: str) -> dict[str, Any]:
    """The body of an error as OpenAI's API has it."""
    kind = _KINDS.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


class ApiGuard:
    """ASGI middleware.

    Args:
        token: what `Authorization: Bearer` must contain; None for no check.
        max_body: bytes of a request.
    """

    def __init__(self, app: Callable, token: str | None, max_body: int) -> None:
        self.app, self._token, self._max_body = app, token, max_body

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def noticed(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            self._check(scope)
            await self.app(scope, self._limited(receive), noticed)
        except Rejected as error:
            if not started:
                await _reject(send, error)

    def _check(self, scope: Message) -> None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        if scope["method"] not in ("GET", "HEAD"):
            check_origin(scope)
            declared = headers.get(b"content-length", b"0")
            if declared.isdigit() and int(declared) > self._max_body:
                raise Rejected(413, f"the request is larger than {self._max_body} bytes")
        if self._token is None or scope["path"] in OPEN_PATHS:
            return
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self._token.encode()):
            raise Rejected(401, "expected the header Authorization: Bearer with the server's token (--api_key)")

    def _limited(self, receive: Receive) -> Receive:
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_body:
                raise Rejected(413, f"the request is larger than {self._max_body} bytes")
            return message

        return counted


async def _reject(send: Send, error: Rejected) -> None:
    body = json.dumps(error_body(error.status, error.reason)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers.append((b"connection", b"close"))  # the rest of the request is not read
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
