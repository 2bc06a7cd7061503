"""Exclusive use of an output folder: one run at a time, whose processes succeed or fail together."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch

from evotok_plugin.common.locks import LOCK, lock_bytes, unlock_bytes
from evotok_plugin.common.processes import Processes
from evotok_plugin.errors import UserError

T = TypeVar("T")

_ALONE = Processes(0, 1, torch.device("cpu"))


def together(processes: Processes, action: Callable[[], T]) -> T:
    """Call a function in all processes; an error in one ends all, so that none waits for the others.

    Raises:
        UserError: an OSError or UserError in any process, or another exception in another process.
        Exception: any other exception in this process, unchanged.
    """
    failure: Exception | None = None
    try:
        result = action()
    except Exception as error:
        failure = error
    problems = [text for text in processes.gather(_described(failure)) if text]
    if failure is not None and not isinstance(failure, (UserError, OSError)):
        raise failure
    if problems:
        raise UserError(problems[0])
    return result


def _described(failure: Exception | None) -> str:
    """The message of an error; empty without an error."""
    if failure is None:
        return ""
    kind = type(failure).__name__
    return (
        str(failure) or kind
        if isinstance(failure, (UserError, OSError))
        else f"another process failed: {kind}: {failure}"
    )


@contextlib.contextmanager
def only_run(
    folder: str | Path, processes: Processes = _ALONE, prepare: Callable[[], object] = lambda: None
) -> Iterator[None]:
    """Lock a folder against other runs for the time of a block; it is created if necessary.

    Every process locks one byte of the file `.lock`; the first process begins by locking all bytes. So a run whose
    first process was killed excludes others until its last process has ended. A new folder that holds nothing else
    afterwards is removed.

    Args:
        prepare: called by the first process while no other process of any run has the folder.

    Raises:
        UserError: another run has locked the folder, or it cannot be created.
    """
    folder = Path(folder)
    with contextlib.ExitStack() as held:

        def begin() -> None:
            is_new = not folder.exists()
            file = held.enter_context(lock_bytes(folder / LOCK, folder))
            if is_new:
                held.callback(_remove_if_unused, folder)
            prepare()
            unlock_bytes(file, 1, 0)  # all but the first byte

        def follow() -> None:
            held.enter_context(lock_bytes(folder / LOCK, folder, processes.rank, 1))

        together(processes, begin if processes.is_first else lambda: None)
        together(processes, follow if not processes.is_first else lambda: None)
        yield


def _remove_if_unused(folder: Path) -> None:
    """Remove a folder that holds only the lock file, which is still locked."""
    with contextlib.suppress(OSError):
        if os.listdir(folder) == [LOCK]:
            (folder / LOCK).unlink()
            folder.rmdir()
