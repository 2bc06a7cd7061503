"""Time limits for clients that send requests or read responses slowly, so that they do not occupy the server."""

import asyncio
from typing import Any

REQUEST_S = 10.0  # for the headers of a request
READING_S = 30.0  # for a client to read what the system's buffers hold


def limit_slow_clients(server: Any, max_connections: int) -> None:
    """Close connections of a running uvicorn server whose clients are slow, and reject those beyond a number.

    The body of a request is not limited here; `RequestFilter` reads it.
    """
    config = server.config
    config.limit_concurrency = max_connections
    config.http_protocol_class = type("SlowClientProtocol", (_SlowClientLimits, config.http_protocol_class), {})


class _SlowClientLimits:
    """Mixin of uvicorn's protocols, which create one object per connection."""

    _timers: dict[str, asyncio.TimerHandle]

    def connection_made(self, transport: Any) -> None:
        self._timers = {}
        super().connection_made(transport)  # type: ignore[misc]
        self._start("request", REQUEST_S)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)  # type: ignore[misc]
        cycle: Any = self.cycle  # type: ignore[attr-defined]
        if cycle is not None and not cycle.response_complete:
            self._cancel("request")  # the headers are complete
        elif "request" not in self._timers:
            self._start("request", REQUEST_S)  # the next request has begun

    def pause_writing(self) -> None:
        super().pause_writing()  # type: ignore[misc]
        self._start("reading", READING_S)

    def resume_writing(self) -> None:
        super().resume_writing()  # type: ignore[misc]
        self._cancel("reading")

    def connection_lost(self, error: Exception | None) -> None:
        for name in list(self._timers):
            self._cancel(name)
        super().connection_lost(error)  # type: ignore[misc]

    def _start(self, name: str, seconds: float) -> None:
        transport: Any = self.transport  # type: ignore[attr-defined]
        self._cancel(name)
        self._timers[name] = asyncio.get_running_loop().call_later(seconds, transport.abort)

    def _cancel(self, name: str) -> None:
        if timer := self._timers.pop(name, None):
            timer.cancel()
