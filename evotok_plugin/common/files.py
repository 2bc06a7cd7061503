"""Files and folders on disk: file modes, outputs that are checked before any work, folders written as a whole."""

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from evotok_plugin.common.owned_folder import MARKER, PROGRAM, read_marker, write_marker
from evotok_plugin.errors import UserError

_FILE_SUFFIXES = frozenset(
    ".png .jpg .jpeg .webp .bmp .gif .tif .tiff .pdf .svg .json .jsonl .csv .tsv .md .txt .html .yaml .yml .npy .npz "
    ".safetensors .bin .pt .pth .parquet .tar .zip .gz".split()
)
_umask_lock = threading.Lock()


# Modes -------------------------------------------------------------------------------------------------------


def _umask() -> int:
    with contextlib.suppress(OSError, StopIteration, ValueError):
        # The only way to read the umask without changing it for the other threads.
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Umask:"))
        return int(line.split()[1], 8)
    with _umask_lock:
        umask = os.umask(0o077)
        os.umask(umask)
    return umask


def apply_umask(*paths: str | Path) -> None:
    """Give files the mode that the umask asks for; libraries that write through private temporary files leave 0600."""
    mode = 0o666 & ~_umask()
    for path in paths:
        os.chmod(path, mode)


def apply_umask_to_weights(folder: str | Path) -> None:
    """`apply_umask` for the weights that `save_pretrained` has just written into a folder."""
    apply_umask(*Path(folder).glob("model*.safetensors"))


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn an error of the file system, while a block writes to `path` or below it, into a UserError that names it."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        where = getattr(error, "filename", None) or path
        cause = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(
            f"{where} cannot be written: {cause}; make room or change its permissions, or choose another output"
        ) from error


# Outputs that are checked before any work --------------------------------------------------------------------


def check_output_folder(folder: str | Path, flag: str = "-o") -> None:
    """Check that files can be written into a folder, which is not created yet.

    Raises:
        UserError: it is a file, has the name of a file, or it cannot be created or written to.
    """
    folder = Path(folder)
    if folder.suffix.lower() in _FILE_SUFFIXES and not folder.is_dir():
        raise UserError(f"{flag} {folder}: expected a folder, got the name of a {folder.suffix} file; name a folder")
    _check_writable(folder, folder, flag)


def check_output_file(path: str | Path, suffixes: Iterable[str], flag: str = "-o") -> None:
    """Check that a file can be written, which is not created yet.

    Args:
        suffixes: the ones that can be written, in lower case with their dots.

    Raises:
        UserError: another suffix, a folder of that name, or a folder that cannot be created or written to.
    """
    path, known = Path(path), sorted(set(suffixes))
    if path.is_dir():
        raise UserError(f"{flag} {path} is a folder, expected a file; name one in it, such as {path / 'out'}{known[0]}")
    if path.suffix.lower() not in known:
        got = repr(path.suffix) if path.suffix else "a name without a suffix"
        raise UserError(f"{flag} {path}: expected one of {', '.join(known)}, got {got}")
    if path.exists() and not os.access(path, os.W_OK):
        raise UserError(f"{flag} {path} cannot be written to; name another file")
    _check_writable(path.parent, path, flag)


def _check_writable(folder: Path, shown: Path, flag: str) -> None:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink())
    if not existing.is_dir():
        raise UserError(f"{flag} {shown} cannot be written: {existing} is not a folder; choose another output")
    probe = existing / f".evotok-probe-{os.getpid()}"
    try:  # os.access says yes to root where a file system says no
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise UserError(
            f"{flag} {shown} cannot be written: {existing}: {error.strerror}; choose another output"
        ) from error


# Folders written as a whole ----------------------------------------------------------------------------------


@contextlib.contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """A temporary folder next to `folder` that takes its name when the block ends; on an error it is removed.

    Raises:
        UserError: `folder` is a file or not empty.
    """
    folder = Path(folder)
    check_new_folder(folder)
    temporary = _temporary_folder(folder)
    try:
        yield temporary
        marker = read_marker(temporary) or {}
        if marker.pop("temporary", False) and marker.get("entries"):
            write_marker(temporary / MARKER, marker)  # a run wrote into it: its record stays
        else:
            (temporary / MARKER).unlink(missing_ok=True)
        apply_umask(*temporary.rglob("*.safetensors"))
        if folder.is_dir() and _holds_only_marker(folder):
            (folder / MARKER).unlink()
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # created above
        raise


@contextlib.contextmanager
def scratch_folder(folder: str | Path) -> Iterator[Path]:
    """A temporary folder next to where `folder` would be, removed when the block ends."""
    temporary = _temporary_folder(Path(folder))
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # created above


def check_new_folder(folder: str | Path) -> None:
    """Check that a folder can be created: it does not exist, or is empty but for our marker.

    Raises:
        UserError: a file of that name, or a folder that holds something.
    """
    folder = Path(folder)
    if (
        folder.is_symlink()
        and not folder.exists()
        or folder.exists()
        and (not folder.is_dir() or any(folder.iterdir()))
        and not (folder.is_dir() and _holds_only_marker(folder))
    ):
        raise UserError(f"{str(folder)!r} exists and is not empty; choose a new folder")


def _holds_only_marker(folder: Path) -> bool:
    """Whether a run has claimed a folder and has written nothing into it."""
    return [path.name for path in folder.iterdir()] == [MARKER] and read_marker(folder) is not None


def _temporary_folder(folder: Path) -> Path:
    """Create the folder; one that a killed process has left is reused, one without our marker is never touched."""
    number = 1
    while True:
        temporary = folder.with_name(f".{folder.name}.part" + (f"-{number}" if number > 1 else ""))
        if (read_marker(temporary) or {}).get("temporary"):
            shutil.rmtree(temporary)
        try:
            temporary.mkdir(parents=True)
        except FileExistsError:
            number += 1
            continue
        write_marker(temporary / MARKER, {"program": PROGRAM, "temporary": True, "entries": []})
        return temporary


def write_whole_folder(folder: str | Path, write: Callable[[Path], None]) -> None:
    """Have `write` fill a folder that takes its name once it is complete; on an error nothing is left of it.

    Raises:
        UserError: there is something in the folder, a file has that name, or the file system refuses.
    """
    with writing(folder), whole_folder(folder) as temporary:
        write(temporary)


# Files written as a whole ------------------------------------------------------------------------------------


def write_whole(path: str | Path, write: Callable[[Path], None], sync: bool = False) -> None:
    """Have `write` write a temporary file next to `path`, which then takes its name: a reader, or a run after a kill,
    finds the previous file or the new one, never a part.

    Args:
        sync: flush the file to the disk before it takes its name, and the folder afterwards, so that it survives a
            loss of power.

    Raises:
        UserError: the file system refuses; the message names the file.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.part")
    with writing(path):
        try:
            write(temporary)
            if sync:
                _flush(temporary)
            os.replace(temporary, path)
            if sync:
                _flush(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_text(path: str | Path, text: str) -> None:
    """`write_whole` for text in UTF-8."""
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8") and None)


def write_json(path: str | Path, value: Any) -> None:
    """`write_whole` for a JSON file of one value, indented by a space."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cache_folder(name: str) -> Path:
    """The user's folder for things that can be computed again: `$XDG_CACHE_HOME/evotok/NAME`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "evotok" / name
