"""Middleware between the network and the page: limits requests, and blocks content from other servers."""

import asyncio
import json
import tempfile
from collections.abc import Awaitable, Callable, Iterable, Iterator, MutableMapping
from dataclasses import dataclass
from itertools import chain
from typing import IO, Any
from urllib.parse import urlsplit

from evotok_plugin.errors import UserError
from llava_ext.serving.page_files import PageFiles

_MAX_BODY = 2**18  # bytes of a request that is not an upload; the longest message takes a tenth of this
_MAX_PATH = 4096  # characters of a path with its query
_MAX_ID = 64  # characters of identifiers that clients choose, which gradio keeps
_MAX_UPLOADS = 8  # that are received at the same time
_CHUNK = 2**20
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
_OWN_SITES = (b"same-origin", b"none")  # of Sec-Fetch-Site; "none" is typed into the address bar
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


@dataclass(frozen=True)
class BodyLimits:
    """Limits of the bodies of requests.

    Attributes:
        max_upload: bytes of an upload with all its files; 64 MB by default.
        idle_s: seconds without any data.
        grace_s, bytes_per_s: after `grace_s` seconds, a body must have arrived at this speed on average.
    """

    max_upload: int = 2**26
    idle_s: float = 10.0
    grace_s: float = 20.0
    bytes_per_s: int = 16_384


class Rejected(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


class RequestFilter:
    """ASGI middleware around the page's server.

    Response headers forbid the browser to load content from other servers. Requests that change anything must not come
    from a page of another origin: any web site could otherwise send them through a visitor's browser. Requests other
    than uploads must be small and must not contain files by URL or as base64: gradio would fetch or decode them without
    the limits of uploads. Uploads are received completely before gradio sees them, so that an interrupted one leaves no
    file.

    Args:
        files: the page's files; by default with a quota of 1 GB.
        after_request: called after every request that may change something.
    """

    def __init__(
        self,
        app: Callable,
        files: PageFiles | None = None,
        limits: BodyLimits | None = None,
        after_request: Callable[[], None] = lambda: None,
    ) -> None:
        self.app = app
        self._files, self._limits = files or PageFiles(2**30), limits or BodyLimits()
        self._after_request = after_request
        self._num_uploads = self._reserved = 0
        self._passing = asyncio.Lock()  # gradio gets one upload at a time, so that its leftovers can be told apart

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *_HEADERS]}
            await send(message)

        try:
            if len(scope["path"]) + len(scope.get("query_string", b"")) > _MAX_PATH:
                raise Rejected(414, f"the path is longer than {_MAX_PATH} characters")
            if scope["method"] in _SAFE_METHODS:
                await self.app(scope, receive, send_with_headers)
                return
            check_origin(scope)
            if scope["path"].rstrip("/").endswith("/upload"):
                await self._upload(scope, receive, send_with_headers)
            else:
                body = bytearray()
                await self._read(receive, _MAX_BODY, body.extend)
                _check_body(bytes(body))
                await self.app(scope, _replay([bytes(body)], receive), send_with_headers)
            self._after_request()
        except Rejected as error:
            await _reject(send_with_headers, error)
        except _Disconnected:
            return

    async def _upload(self, scope: Message, receive: Receive, send: Send) -> None:
        """Receive an upload into a file without a name, then pass it on."""
        if len(scope.get("query_string", b"")) > 2 * _MAX_ID:
            raise Rejected(414, "the identifier of the upload is too long")
        declared = _content_length(scope)
        if declared > self._limits.max_upload:
            raise Rejected(413, f"the upload is larger than {self._limits.max_upload} bytes")
        if self._num_uploads >= _MAX_UPLOADS:
            raise Rejected(503, "too many uploads at the same time; try again")
        reserved = declared or self._limits.max_upload
        self._num_uploads, self._reserved = self._num_uploads + 1, self._reserved + reserved
        try:
            await self._make_room()
            with tempfile.TemporaryFile() as file:
                await self._read(receive, self._limits.max_upload, file.write)
                async with self._passing:
                    before = self._files.unfinished()
                    try:
                        await self.app(scope, _replay(_chunks(file), receive), send)
                    finally:
                        for path in self._files.unfinished() - before:
                            path.unlink(missing_ok=True)
        finally:
            self._num_uploads, self._reserved = self._num_uploads - 1, self._reserved - reserved

    async def _make_room(self) -> None:
        try:
            await asyncio.to_thread(self._files.make_room, self._reserved)
        except UserError as error:
            raise Rejected(507, str(error)) from error

    async def _read(self, receive: Receive, max_bytes: int, store: Callable[[bytes], Any]) -> None:
        """Read a request's body within the limits of size and time."""
        loop, limits = asyncio.get_running_loop(), self._limits
        started, num_bytes, more = loop.time(), 0, True
        while more:
            left = limits.grace_s + num_bytes / limits.bytes_per_s - (loop.time() - started)
            try:
                message = await asyncio.wait_for(receive(), min(left, limits.idle_s))
            except TimeoutError:
                raise Rejected(408, "the request arrives too slowly") from None
            if message["type"] != "http.request":
                raise _Disconnected
            body = message.get("body", b"")
            num_bytes, more = num_bytes + len(body), message.get("more_body", False)
            if num_bytes > max_bytes:
                raise Rejected(413, f"the request is larger than {max_bytes} bytes")
            store(body)


class _Disconnected(Exception):
    """The client has gone before its request was complete."""


def _chunks(file: IO[bytes]) -> Iterator[bytes]:
    file.seek(0)
    while chunk := file.read(_CHUNK):
        yield chunk


def _replay(parts: Iterable[bytes], receive: Receive) -> Receive:
    """Create a `receive` that returns the parts of a body, which was read already, and then further messages."""
    left, is_open = chain(parts, [None]), True

    async def replay() -> Message:
        nonlocal is_open
        if not is_open:
            return await receive()
        part = next(left)
        is_open = part is not None
        return {"type": "http.request", "body": part or b"", "more_body": is_open}

    return replay


# Checks ----------------------------------------------------------------------------------------------------------


def _content_length(scope: Message) -> int:
    """The declared number of bytes of a body; 0 if it is not known."""
    given = dict(scope["headers"]).get(b"content-length", b"")
    return int(given) if given.isdigit() else 0


def check_origin(scope: Message) -> None:
    """Check that no page of another origin has sent a request; programs other than browsers send neither header.

    Raises:
        Rejected: such a page has.
    """
    headers = [(name.lower(), value) for name, value in scope["headers"]]
    hosts = {value.decode("latin-1").lower() for name, value in headers if name == b"host"}
    for name, value in headers:
        is_foreign_site = name == b"sec-fetch-site" and value.lower() not in _OWN_SITES
        is_foreign_origin = name == b"origin" and {_host_of(value)} != hosts
        if is_foreign_site or is_foreign_origin:
            raise Rejected(403, "requests from pages of other origins are rejected")


def _host_of(origin: bytes) -> str:
    try:
        return urlsplit(origin.decode("latin-1")).netloc.lower()  # empty for "null"
    except ValueError:
        return ""


def _check_body(body: bytes) -> None:
    """Reject a request with a file that was not uploaded, or with a long identifier."""
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        return  # not JSON: the server rejects it, or it contains no file
    if isinstance(values, dict):
        for name in ("session_hash", "event_id"):
            if values.get(name) is not None and not (isinstance(values[name], str) and len(values[name]) <= _MAX_ID):
                raise Rejected(400, f"{name}: expected a text of up to {_MAX_ID} characters")
    if any(
        str(file.get("path", "")).lower().startswith(("http:", "https:", "data:"))
        or str(file.get("url", "")).lower().startswith("data:")
        or ("path" in file and file.get("meta") != _FILE_META)  # without it, gradio does not check the path
        for file in _files(values)
    ):
        raise Rejected(400, "files must be uploaded, not given by a URL")


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


async def _reject(send: Send, error: Rejected) -> None:
    body = json.dumps({"detail": error.reason, "error": error.reason}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers.append((b"connection", b"close"))  # the rest of the request is not read
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
