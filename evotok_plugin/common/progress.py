"""Progress bars: frequent updates on a terminal, at most one state per 15 s in a log file."""

import math
import sys
from collections.abc import Iterable
from time import time
from typing import Any, TypeVar, overload

from tqdm import tqdm

from evotok_plugin.common.interruption import check_stopped

T = TypeVar("T")

_TERMINAL_INTERVAL, _LOG_INTERVAL = 0.2, 15.0  # seconds


def progress_interval() -> float:
    """Minimum number of seconds between two states of a bar: short on a terminal, long in a log file."""
    return _TERMINAL_INTERVAL if sys.stderr.isatty() else _LOG_INTERVAL


def progress_environment() -> dict[str, str]:
    """Environment variables that limit the bars of other programs, started as child processes, in log files.

    tqdm then updates its bars every 15 s; the short bars of huggingface_hub, transformers and datasets are disabled.
    """
    if sys.stderr.isatty():
        return {}
    interval = str(_LOG_INTERVAL)
    disabled = dict.fromkeys(("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"), "1")
    return {"TQDM_MININTERVAL": interval, "TQDM_MAXINTERVAL": interval, **disabled}


class _Bar(tqdm):
    """A bar that obeys `mininterval` however it is refreshed, and that no lost terminal turns into an error.

    tqdm ignores the interval in `set_postfix` and `set_description`, and its monitor thread refreshes bars whose
    `miniters` is above 1. An update is a safe point of `stop_on_signals`.
    """

    monitor_interval = 0  # `miniters` is 1, so the monitor thread has nothing to do
    _shown_at = -math.inf

    def refresh(self, nolock: bool = False, lock_args: tuple | None = None) -> None:
        if self.disable:
            return
        now = time()
        if self._shown_at == -math.inf and self.mininterval >= _LOG_INTERVAL:
            self._shown_at = now  # a log file does not need the empty bar
        if now - self._shown_at >= self.mininterval:
            self._shown_at = now
            try:
                super().refresh(nolock, lock_args)
            except OSError:  # the terminal is gone: the work goes on without a bar
                self.disable = True

    def update(self, n: float | None = 1) -> bool | None:
        check_stopped()
        return super().update(n)

    def close(self) -> None:
        try:
            super().close()
        except OSError:
            self.disable = True


@overload
def progress_bar(
    iterable: Iterable[T],
    *,
    total: int | None = None,
    desc: str | None = None,
    unit: str = "it",
    initial: int = 0,
    disable: bool = False,
) -> "tqdm[T]": ...


@overload
def progress_bar(
    iterable: None = None,
    *,
    total: int | None = None,
    desc: str | None = None,
    unit: str = "it",
    initial: int = 0,
    disable: bool = False,
) -> "tqdm[Any]": ...


def progress_bar(
    iterable: Iterable[Any] | None = None,
    *,
    total: int | None = None,
    desc: str | None = None,
    unit: str = "it",
    initial: int = 0,
    disable: bool = False,
) -> "tqdm[Any]":
    """A tqdm bar on stderr.

    Where stderr is not a terminal it prints at most one state per 15 s, and its last state when it is closed.
    """
    return _Bar(
        iterable, total=total, desc=desc, unit=unit, initial=initial, disable=disable,
        mininterval=progress_interval(), miniters=1, dynamic_ncols=True,
    )  # fmt: skip
