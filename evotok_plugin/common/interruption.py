"""Clean stops: Ctrl-C, SIGTERM and SIGHUP are recorded and checked at safe points.

`stop_on_signals` covers a whole command: a signal raises `Stopped`, and is recorded in case the exception is lost
(Python drops exceptions that are raised in a fork hook or a destructor). `StopSignals` covers the part of a run that
first saves its work. SIGHUP is left alone if it was ignored at the start: `nohup` asks for that. SIGINT and SIGTERM are
always handled, because a shell's background job starts with SIGINT ignored, and `kill -INT` should stop it cleanly.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

_ONE_REQUEST_S = 3.0  # a launcher and a batch system may both forward the same request
_clock = time.monotonic


class Stopped(KeyboardInterrupt):
    """Raised where a signal stops a command that has nothing to save.

    Attributes:
        number: the number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = int(number)


@dataclass
class _Record:
    """The signals of this process.

    Attributes:
        pending: the number of a signal that has raised `Stopped`, or 0.
        num_recording: blocks of `StopSignals` that are active.
        terminals: streams that were terminals when a handler was installed.
    """

    pending: int = 0
    is_active: bool = False
    num_recording: int = 0
    terminals: list[int] = field(default_factory=list)


_record = _Record()


def _stopping_signals() -> list[int]:
    numbers: list[int] = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    return numbers


def _note_terminals() -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):  # a stream may be closed or replaced
        _record.terminals = [s.fileno() for s in (sys.stdout, sys.stderr) if s.fileno() in (1, 2) and s.isatty()]


def _leave_terminal(number: int) -> None:
    """After SIGHUP the terminal is gone: an error at the next line of output would end a run before it has saved."""
    if number == getattr(signal, "SIGHUP", None):
        for descriptor in _record.terminals:
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[None]:
    """Raise `Stopped` at SIGINT, SIGTERM or SIGHUP within the block, and keep a record of it for `check_stopped`.

    A block within another one, or in another thread than the main one, changes nothing.
    """
    if _record.is_active or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        _record.pending = number
        _leave_terminal(number)
        raise Stopped(number)

    _note_terminals()
    _record.is_active, _record.pending = True, 0
    before: dict[int, Any] = {}
    try:
        for number in _stopping_signals():
            before[number] = signal.signal(number, stop) or signal.SIG_DFL
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _record.is_active, _record.pending = False, 0


def check_stopped() -> None:
    """Raise `Stopped` again for a signal whose exception was lost; a safe point for steps of a command.

    Within `StopSignals` this does nothing: the run stops where its work is saved.
    """
    if _record.pending and not _record.num_recording:
        raise Stopped(_record.pending)


def forget_stop() -> None:
    """Forget a Ctrl-C that has been handled, for example one that has ended only the answer of a conversation."""
    _record.pending = 0


class StopSignals:
    """Records SIGINT, SIGTERM and SIGHUP between `begin` and `end`, or within a `with` block.

    A second signal, more than three seconds after the first, has its previous effect.

    Attributes:
        caught: the number of the signal that arrived, also before `begin` in a block of `stop_on_signals`; or 0.
    """

    def __init__(self) -> None:
        self.caught, self._caught_at = 0, 0.0
        self._before: dict[int, Any] = {}

    def begin(self) -> None:
        if threading.current_thread() is threading.main_thread() and not self._before:  # only it can set handlers
            if not _record.is_active:
                _note_terminals()
            for number in _stopping_signals():
                self._before[number] = signal.signal(number, self._note) or signal.SIG_DFL
            _record.num_recording += 1
            if _record.pending and not self.caught:
                self.caught, self._caught_at = _record.pending, _clock()

    def _note(self, number: int, frame: object) -> None:
        _leave_terminal(number)
        if not self.caught:
            self.caught, self._caught_at = int(number), _clock()
        elif _clock() - self._caught_at > _ONE_REQUEST_S:
            self.end()
            signal.raise_signal(number)

    def end(self) -> None:
        if self._before:
            _record.num_recording -= 1
        while self._before:
            signal.signal(*self._before.popitem())

    def __enter__(self) -> "StopSignals":
        self.begin()
        return self

    def __exit__(self, *error: object) -> None:
        self.end()


def exit_with_parent(worker: int = 0) -> None:
    """Let a data-loading process end with its parent instead of on signals (`worker_init_fn` of a DataLoader).

    A terminal's Ctrl-C or hangup and a cluster's SIGTERM go to every process: the parent handles them and ends its
    workers. If the parent is killed, its workers exit; PyTorch's own check starts too late for a kill while they are
    starting.
    """
    for number in _stopping_signals():
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "exit_with_parent is for child processes"
    parent.join()
    os._exit(1)
