"""Folders that are complete or absent: they are filled under a temporary name and renamed at the end."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from evotok_plugin.common.files import apply_umask, write_json, writing
from evotok_plugin.common.locks import LOCK, locked
from evotok_plugin.common.owned_folder import MARKER, PROGRAM, read_marker
from evotok_plugin.common.temporary_names import own_temporary_path, remove_abandoned
from evotok_plugin.errors import UserError


@contextlib.contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """A temporary folder next to `folder`, renamed to it when the block ends; on an error it is removed.

    Raises:
        UserError: `folder` is a file or not empty, or its parent cannot be written to.
    """
    folder = Path(folder)
    check_new_folder(folder)
    with _temporary_folder(folder) as temporary:
        yield temporary
        (temporary / LOCK).unlink(missing_ok=True)  # of a run that has written into the folder
        marker = read_marker(temporary) or {}
        if marker.pop("temporary", False) and marker.get("entries"):
            write_json(temporary / MARKER, marker)  # keep the record of a run that wrote into the folder
        else:
            (temporary / MARKER).unlink(missing_ok=True)
        apply_umask(*temporary.rglob("*.safetensors"))
        if folder.is_dir() and _holds_only_marker(folder):
            (folder / MARKER).unlink()
        os.replace(temporary, folder)


def write_whole_folder(folder: str | Path, write: Callable[[Path], object]) -> None:
    """Create a folder atomically: `write` fills a temporary folder, which is then renamed; an error leaves nothing.

    Raises:
        UserError: the folder is not empty, a file has that name, or the file system refuses.
    """
    with writing(folder), whole_folder(folder) as temporary, writing(folder, temporary=temporary):
        write(temporary)


@contextlib.contextmanager
def scratch_folder(folder: str | Path) -> Iterator[Path]:
    """A temporary folder next to where `folder` would be, removed when the block ends."""
    with _temporary_folder(Path(folder)) as temporary:
        yield temporary


def check_new_folder(folder: str | Path) -> None:
    """Check that a folder can be created: it does not exist, or contains nothing but our marker.

    Raises:
        UserError: a file has that name, the folder contains something else, or the path has no name.
    """
    folder = Path(folder)
    if folder.name in ("", ".."):
        raise UserError(f"expected the name of a new folder, got {str(folder)!r}; choose a new folder")
    if not folder.exists():
        is_new = not folder.is_symlink()
    else:
        is_new = folder.is_dir() and (not any(folder.iterdir()) or _holds_only_marker(folder))
    if not is_new:
        raise UserError(f"{str(folder)!r} exists and is not empty; choose a new folder")


def _holds_only_marker(folder: Path) -> bool:
    """Whether a run has claimed a folder but has not written into it."""
    return [path.name for path in folder.iterdir()] == [MARKER] and read_marker(folder) is not None


@contextlib.contextmanager
def _temporary_folder(folder: Path) -> Iterator[Path]:
    """A new folder under a name of this process for the time of a block, removed unless the block has renamed it.

    It is locked against other runs. Folders that killed processes have left are deleted, others are never touched.
    """
    with locked(folder.with_name(f".{folder.name}.part.lock"), folder):
        remove_abandoned(folder)
        old = folder.with_name(f".{folder.name}.part")  # left by earlier versions, whose names had no process
        if (read_marker(old) or {}).get("temporary"):
            shutil.rmtree(old, ignore_errors=True)
        temporary = _create_temporary(folder)
        try:
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)  # created above


def _create_temporary(folder: Path) -> Path:
    temporary = own_temporary_path(folder)
    with writing(folder, temporary=temporary):
        temporary.mkdir(parents=True)
        write_json(temporary / MARKER, {"program": PROGRAM, "temporary": True, "entries": []})
    return temporary
