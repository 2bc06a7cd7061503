"""Ctrl-C and SIGTERM end work in order: they are noted, and whoever works looks when it suits."""

import multiprocessing
import os
import signal
import threading
import time
from typing import Any

_ONE_REQUEST_S = 3.0  # a launcher and a batch system may each pass on the same request
_clock = time.monotonic


class StopSignals:
    """Notes SIGINT and SIGTERM between `begin` and `end`, or within a `with`; a second one, later than a moment, does
    what it did before.

    Attributes:
        caught: the signal's number; 0 before.
    """

    def __init__(self) -> None:
        self.caught, self._caught_at = 0, 0.0
        self._before: dict[int, Any] = {}

    def begin(self) -> None:
        if threading.current_thread() is threading.main_thread():  # Python hands signals to no other
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note) or signal.SIG_DFL

    def _note(self, number: int, frame: object) -> None:
        if not self.caught:
            self.caught, self._caught_at = int(number), _clock()
        elif _clock() - self._caught_at > _ONE_REQUEST_S:
            self.end()
            signal.raise_signal(number)

    def end(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def __enter__(self) -> "StopSignals":
        self.begin()
        return self

    def __exit__(self, *error: object) -> None:
        self.end()


def exit_with_parent(worker: int = 0) -> None:
    """What a data-loading process does first (`worker_init_fn`).

    A terminal's Ctrl-C and a cluster's SIGTERM go to every process: the one that works ends those that read for it.
    When it is killed they end by themselves; PyTorch's own watch over it begins too late for a kill while they start.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
