"""Names of temporary files that several processes may write next to the same file; each name holds its process."""

import contextlib
import os
import re
import secrets
import shutil
import socket
import zlib
from pathlib import Path

_SUFFIX = re.compile(r"\.([0-9a-f]{8})-(\d+)-[0-9a-f]{8}\.part")
_TEMPORARY = re.compile(rf"{_SUFFIX.pattern}$")  # the end of such a name
_LONGEST_STEM = 200  # bytes; a file name may have 255


def own_temporary_path(path: str | Path) -> Path:
    """A new path next to `path`, `.NAME.HOST-PID-RANDOM.part`, that no other process and no other thread uses."""
    path = Path(path)
    return path.with_name(f"{_stem(path)}.{_host()}-{os.getpid()}-{secrets.token_hex(4)}.part")


def remove_abandoned(path: str | Path) -> None:
    """Delete temporary files and folders of `path` whose process on this machine has ended, for example by a kill."""
    path = Path(path)
    with contextlib.suppress(OSError):  # the folder may not exist or not be readable
        for found in os.scandir(path.parent):
            if found.name.startswith(_stem(path)) and is_abandoned(found.name.removeprefix(_stem(path))):
                if found.is_dir(follow_symlinks=False):
                    shutil.rmtree(found.path, ignore_errors=True)
                else:
                    Path(found.path).unlink(missing_ok=True)


def remove_all_abandoned(folder: str | Path) -> None:
    """Delete the temporary files of all paths in a folder as `remove_abandoned` does, reading the folder once."""
    with contextlib.suppress(OSError):
        for found in os.scandir(folder):
            ending = _TEMPORARY.search(found.name)
            if ending is not None and is_abandoned(ending[0]) and found.is_file(follow_symlinks=False):
                Path(found.path).unlink(missing_ok=True)


def is_abandoned(suffix: str) -> bool:
    """Whether a suffix `.HOST-PID-RANDOM.part` names a process of this machine that has ended."""
    match = _SUFFIX.fullmatch(suffix)
    return match is not None and match[1] == _host() and not _is_running(int(match[2]))


def _stem(path: Path) -> str:
    name = os.fsencode(path.name)
    return f".{path.name}" if len(name) <= _LONGEST_STEM else f".{zlib.crc32(name):08x}"


def _host() -> str:
    """This machine, in eight digits: process ids of other machines that share the folder mean nothing here."""
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # of another user
        return True
    return True
