"""Progress bars: frequent updates on a terminal, at most one state per 15 s in a log file."""

import math
import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")

_TERMINAL_INTERVAL, _LOG_INTERVAL = 0.2, 15.0  # seconds


def progress_interval() -> float:
    """Minimum number of seconds between two states of a bar: short on a terminal, long in a log file."""
    return _TERMINAL_INTERVAL if sys.stderr.isatty() else _LOG_INTERVAL


class _Bar(tqdm):
    """A bar that obeys `mininterval` however it is refreshed.

    tqdm ignores the interval in `set_postfix` and `set_description`, and its monitor thread refreshes bars whose
    `miniters` is above 1.
    """

    monitor_interval = 0  # `miniters` is 1, so the monitor thread has nothing to do
    _shown_at = -math.inf

    def refresh(self, nolock: bool = False, lock_args: tuple | None = None) -> bool | None:
        if self.disable:
            return None
        now = self._time()
        if self._shown_at == -math.inf and self.mininterval >= _LOG_INTERVAL:
            self._shown_at = now  # a log file does not need the empty bar
        if now - self._shown_at < self.mininterval:
            return False
        self._shown_at = now
        return super().refresh(nolock, lock_args)


def progress_bar(
    iterable: Iterable[T] | None = None,
    *,
    total: int | None = None,
    desc: str | None = None,
    unit: str = "it",
    initial: int = 0,
    disable: bool = False,
) -> "tqdm[T]":
    """A tqdm bar on stderr.

    Where stderr is not a terminal it prints at most one state per 15 s, and its last state when it is closed.
    """
    return _Bar(
        iterable, total=total, desc=desc, unit=unit, initial=initial, disable=disable,
        mininterval=progress_interval(), miniters=1, dynamic_ncols=True,
    )  # fmt: skip
