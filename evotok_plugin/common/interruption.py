"""Clean stops: Ctrl-C and SIGTERM are recorded and checked at a safe point."""

import multiprocessing
import os
import signal
import threading
import time
from typing import Any

_ONE_REQUEST_S = 3.0  # a launcher and a batch system may both forward the same request
_clock = time.monotonic


class StopSignals:
    """Records SIGINT and SIGTERM between `begin` and `end`, or within a `with` block.

    A second signal, more than three seconds after the first, has its previous effect.

    Attributes:
        caught: the number of the signal that arrived, or 0.
    """

    def __init__(self) -> None:
        self.caught, self._caught_at = 0, 0.0
        self._before: dict[int, Any] = {}

    def begin(self) -> None:
        if threading.current_thread() is threading.main_thread():  # only the main thread can set handlers
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
    """Let a data-loading process end with its parent instead of on signals (`worker_init_fn` of a DataLoader).

    A terminal's Ctrl-C and a cluster's SIGTERM go to every process: the parent handles them and ends its workers. If
    the parent is killed, its workers exit; PyTorch's own check starts too late for a kill while they are starting.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "exit_with_parent is for child processes"
    parent.join()
    os._exit(1)
