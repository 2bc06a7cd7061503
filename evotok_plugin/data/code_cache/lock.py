"""One run at a time writes to a code cache; its processes succeed or fail together."""

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


def together(processes: Processes, action: Callable[[], T]) -> T | None:
    """Call a function in all processes; an error of one of them is raised in all, so that none waits for another."""
    result, problem = None, None
    try:
        result = action()
    except (UserError, OSError) as error:
        problem = str(error)
    problems = [text for text in processes.gather(problem) if text]
    if problems:
        raise UserError(problems[0])
    return result


@contextlib.contextmanager
def only_run(folder: Path, facts: CacheFacts, processes: Processes) -> Iterator[None]:
    """Make the folder ready and keep other runs away from it.

    Every process holds its own byte of a lock file, and the first one begins by asking for all bytes: so a run whose
    first process was killed keeps others away until its last one is gone. Record locks, unlike `flock`'s, do not pass
    to data-loading processes, which may outlive a killed run.

    Raises:
        UserError: another run holds the folder, it is not a cache, or it holds codes of another tokenizer.
    """
    with contextlib.ExitStack() as held:

        def begin() -> None:
            file = held.enter_context(_locked(folder, start=0, length=0))
            _make_ready(folder, facts)
            fcntl.lockf(file, fcntl.LOCK_UN, 0, 1)  # all but the first byte

        def follow() -> None:
            held.enter_context(_locked(folder, start=processes.rank, length=1))

        together(processes, begin if processes.is_first else lambda: None)
        together(processes, follow if not processes.is_first else lambda: None)
        yield


def _locked(folder: Path, start: int, length: int) -> IO:
    """The lock file with bytes of it locked until it is closed; length 0 locks all that follow."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a")
    except OSError as error:
        raise UserError(f"{str(folder)!r} cannot be made a code cache: {error}; choose another folder") from error
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
    """Write `cache.json` if the cache is new, and remove the unfinished files of a killed run."""
    if (folder / "cache.json").is_file():
        CacheFacts.read(folder).check(folder, facts.fingerprint, facts.image_size)
    elif next(folder.glob("shard-*"), None) is not None:
        raise UserError(
            f"{str(folder)!r} holds shard files but no cache.json that says what they are; choose another folder"
        )
    else:
        facts.write(folder)
    for path in folder.iterdir():
        orphan = re.fullmatch(r"shard-\d+\.npy", path.name) and not path.with_suffix(".json").exists()
        if orphan or re.fullmatch(r"(shard-\d+\.(npy|json)|cache\.json)\.tmp", path.name):
            path.unlink()
