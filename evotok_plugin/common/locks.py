"""Lock files: exclusive use of a folder or a file by one run."""

import contextlib
import errno
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from evotok_plugin.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

LOCK = ".lock"
_HELD = (errno.EACCES, errno.EAGAIN)


def lock_bytes(path: Path, what: Path, start: int = 0, length: int = 0) -> IO:
    """Open a lock file, which is created if necessary, with some of its bytes locked until it is closed.

    Record locks, unlike those of `flock`, are not inherited by data-loading processes, which may outlive a killed run.

    Args:
        what: the folder or file that the lock is for, for the error messages.
        length: number of bytes; 0 locks all bytes from `start`.

    Raises:
        UserError: another run has locked them, or the file cannot be created.
    """
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a")
        except OSError as error:
            named = what if isinstance(error, (FileExistsError, NotADirectoryError)) else error.filename or what
            raise UserError(f"{named} cannot be written: {error.strerror}; choose another output") from error
        if fcntl is None:
            logger.warning("%s: this system has no file locks; start no other run with this output", what)
            return file
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
        except OSError as error:
            if error.errno in _HELD:
                file.close()
                raise UserError(
                    f"another run is writing to {what} ({error.strerror}); wait until it has ended, or choose another "
                    "output"
                ) from error
            logger.warning("%s: the file system has no locks; start no other run with this output", what)
            return file
        if _is_current(file, path):
            return file
        file.close()  # another run has removed the file before it was locked here


def unlock_bytes(file: IO, start: int, length: int) -> None:
    """Release some of the bytes that `lock_bytes` has locked."""
    if fcntl is None:
        return
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.lockf(file, fcntl.LOCK_UN, length, start)


@contextlib.contextmanager
def locked(path: Path, what: Path) -> Iterator[None]:
    """Hold a lock file for the time of a block, and remove it afterwards; arguments and errors as `lock_bytes`."""
    with lock_bytes(path, what):
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()


def _is_current(file: IO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except OSError:
        return False
