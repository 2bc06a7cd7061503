"""Exclusive writing to a code cache: one run at a time, whose processes succeed or fail together."""

import contextlib
import fcntl
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TypeVar

from evotok_plugin.common.processes import Processes
from evotok_plugin.data.code_cache.shards import CacheFacts
from evotok_plugin.errors import UserError

T = TypeVar("T")

_FILES = r"(shard-\d+\.(npy|json)|cache\.json)"
_TEMPORARY = re.compile(rf"\.{_FILES}\.part|{_FILES}\.tmp")  # names of `write_whole`, and of earlier versions


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
def only_run(folder: Path, facts: CacheFacts, processes: Processes) -> Iterator[None]:
    """Prepare the folder and lock it against other runs.

    Every process locks one byte of a lock file; the first process begins by locking all bytes. So a run whose first
    process was killed excludes others until its last process has ended. Record locks, unlike those of `flock`, are not
    inherited by data-loading processes, which may outlive a killed run.

    Raises:
        UserError: another run has locked the folder, it is not a cache, or it contains codes of another tokenizer.
    """
    with contextlib.ExitStack() as held:

        def begin() -> None:
            file = held.enter_context(_locked(folder, start=0, length=0))
            _make_ready(folder, facts)
            fcntl.lockf(file, fcntl.LOCK_UN, 0, 1)  # unlocks all but the first byte

        def follow() -> None:
            held.enter_context(_locked(folder, start=processes.rank, length=1))

        together(processes, begin if processes.is_first else lambda: None)
        together(processes, follow if not processes.is_first else lambda: None)
        yield


def _locked(folder: Path, start: int, length: int) -> IO:
    """Open the lock file with some of its bytes locked until it is closed; length 0 locks all bytes from `start`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a")
    except OSError as error:
        raise UserError(f"{str(folder)!r} cannot become a code cache: {error}; choose another folder") from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
    except OSError as error:
        file.close()
        raise UserError(
            f"another run is writing to {str(folder)!r} ({error.strerror}); wait until it has ended, or choose "
            "another folder"
        ) from error
    return file


def _make_ready(folder: Path, facts: CacheFacts) -> None:
    """Write `cache.json` if the cache is new, and remove unfinished files of a killed run."""
    if (folder / "cache.json").is_file():
        CacheFacts.read(folder).check(folder, facts.fingerprint, facts.image_size)
    elif next(folder.glob("shard-*"), None) is not None:
        raise UserError(
            f"{str(folder)!r} contains shard files but no cache.json that describes them; choose another folder"
        )
    else:
        facts.write(folder)
    for path in folder.iterdir():
        orphan = re.fullmatch(r"shard-\d+\.npy", path.name) and not path.with_suffix(".json").exists()
        if orphan or _TEMPORARY.fullmatch(path.name):
            path.unlink()
