"""Files and folders on disk: file modes, outputs that are checked before any work, folders written as a whole."""

import contextlib
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from evotok_plugin.common.owned_folder import MARKER, PROGRAM, read_marker, write_json
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
    """Turn an error of the file system, while a block writes to `path` or below it, into a ValueError that names it."""
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
            write_json(temporary / MARKER, marker)  # a run wrote into it: its record stays
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
        write_json(temporary / MARKER, {"program": PROGRAM, "temporary": True, "entries": []})
        return temporary


def prepare_output(folder: str | Path) -> Path:
    """A folder to write a model into.

    Raises:
        UserError: there is something in it, or a file of that name.
    """
    check_new_folder(folder)
    return Path(folder)


def save_whole(folder: str | Path, write: Callable[[Path], None]) -> None:
    """Have `write` fill a folder that gets its name when it is whole.

    Raises:
        UserError: there is something in the folder, or a file of that name.
    """
    prepare_output(folder)
    with whole_folder(folder) as temporary:
        write(temporary)


def write_folder(folder: str | Path, write: Callable[[Path], None]) -> None:
    """Fill a new folder so that it is there whole or not at all.

    Raises:
        UserError: it is there already, or it cannot be written.
    """
    try:
        with whole_folder(folder) as temporary:
            write(temporary)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{str(folder)!r} cannot be written: {error}") from error
