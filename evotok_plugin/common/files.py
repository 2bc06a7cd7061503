"""Files on disk: modes, checks of outputs before any work, and files that are replaced atomically."""

import contextlib
import errno
import json
import os
import secrets
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from evotok_plugin.common.temporary_names import own_temporary_path, remove_abandoned
from evotok_plugin.errors import UserError

_FILE_SUFFIXES = frozenset(
    ".png .jpg .jpeg .webp .bmp .gif .tif .tiff .pdf .svg .json .jsonl .csv .tsv .md .txt .html .yaml .yml .npy .npz "
    ".safetensors .gguf .bin .pt .pth .parquet .tar .zip .gz".split()
)
# A file system without hard links, or one that forbids them.
_NO_LINKS = (errno.EPERM, errno.EACCES, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV)
_ADVICE = "make room or change its permissions, or choose another output"
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
    """Give files of mode 0600 the mode that the umask allows.

    Libraries that write through a private temporary file leave that mode.
    """
    private = [path for path in paths if stat.S_IMODE(os.stat(path).st_mode) == 0o600]
    if private:
        mode = 0o666 & ~_umask()
        for path in private:
            os.chmod(path, mode)


def apply_umask_to_weights(folder: str | Path) -> None:
    """Apply the umask to the weights that `save_pretrained` has just written into a folder."""
    apply_umask(*Path(folder).glob("model*.safetensors"))


def user_path(path: str | Path) -> Path:
    """A path with `~` as the home folder; unlike `Path.expanduser`, the name of an unknown user is left as it is."""
    return Path(os.path.expanduser(path))


# Outputs that are checked before any work --------------------------------------------------------------------


def check_output_folder(folder: str | Path, flag: str = "-o") -> None:
    """Check that files can be written into a folder, without creating it.

    Raises:
        UserError: it is a file, has the name of a file, or cannot be created or written to.
    """
    folder = Path(folder)
    if folder.suffix.lower() in _FILE_SUFFIXES and not folder.is_dir():
        raise UserError(f"{flag} {folder}: expected a folder, got the name of a {folder.suffix} file; name a folder")
    _check_writable(folder, folder, flag)


def check_output_file(path: str | Path, suffixes: Iterable[str], flag: str = "-o") -> None:
    """Check that a file can be written, without creating it.

    Args:
        suffixes: the supported ones, in lower case with their dots.

    Raises:
        UserError: the suffix is not supported, a folder has that name, or the file cannot be created or written to.
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
    probe = existing / f".evotok-probe-{os.getpid()}-{secrets.token_hex(4)}"
    try:  # for root, os.access returns True even on a read-only file system
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise UserError(
            f"{flag} {shown} cannot be written: {existing}: {error.strerror}; choose another output"
        ) from error


# Writing -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def writing(path: str | Path, advice: str = _ADVICE, temporary: Path | None = None) -> Iterator[None]:
    """Turn a file system error, raised while a block writes to `path` or below it, into a UserError naming the file.

    Args:
        advice: what the user can do; the end of the message.
        temporary: the file or folder that the block writes before it is renamed to `path`; the message names `path`.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        where = str(getattr(error, "filename", None) or path)
        if temporary is not None:
            where = where.replace(str(temporary), str(path))
        cause = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"{where} cannot be written: {cause}; {advice}") from error


def temporary_path(path: str | Path) -> Path:
    """The file next to `path` that `write_whole` writes first, unless several processes may write `path`."""
    path = Path(path)
    return path.with_name(f".{path.name}.part")


def write_whole(
    path: str | Path,
    write: Callable[[Path], object],
    sync: bool = False,
    advice: str = _ADVICE,
    shared: bool = False,
    tidy: bool = True,
) -> None:
    """Replace a file atomically: `write` gets a temporary path next to it, which is then renamed.

    A symlink is followed: the file that it points to is replaced.

    A reader, or a run after a kill, finds the previous file or the new one, never a part. After an error the previous
    file is unchanged.

    Args:
        sync: flush the file to disk before it is renamed, and its folder afterwards, so that it survives a power loss.
        advice: what the user can do about an error; the end of its message.
        shared: whether several processes, possibly on several machines, may write the file at the same time. Each then
            has its own temporary file, and the last one to rename it wins. After a kill, the next one on the same
            machine to write `path` deletes the temporary file.
        tidy: False leaves the temporary files of killed processes, for which the whole folder is read; see
            `remove_all_abandoned`, which many files of one folder need only once.

    Raises:
        UserError: the file system refuses; the message names the file.
    """
    path = Path(os.path.realpath(path)) if Path(path).is_symlink() else Path(path)
    temporary = own_temporary_path(path) if shared else temporary_path(path)
    with writing(path, advice, temporary):
        try:
            if shared and tidy:
                remove_abandoned(path)
            temporary.unlink(missing_ok=True)  # left by a kill; it may be a hard link to another file
            write(temporary)
            apply_umask(temporary)
            if sync:
                flush(temporary)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):  # the parent may not be a folder
                temporary.unlink(missing_ok=True)
            raise
        if sync:
            flush(path.parent)


def write_new(
    candidates: Iterable[Path], write: Callable[[Path], object], is_same: Callable[[Path], bool] | None = None
) -> Path:
    """Write a file under the first candidate name that is free, and return that path.

    The file appears complete, and no process ever overwrites a file that another one has just written.

    Args:
        candidates: paths in one existing folder, endless.
        write: gets a temporary path in that folder.
        is_same: whether an existing file may be replaced by the new one.

    Raises:
        UserError: the file system refuses; the message names the first candidate.
    """
    paths = iter(candidates)
    path = next(paths)
    temporary = own_temporary_path(path)
    with writing(path, temporary=temporary):
        try:
            write(temporary)
            apply_umask(temporary)
            while not _claim(temporary, path):
                if is_same is not None and is_same(path):
                    os.replace(temporary, path)
                    break
                path = next(paths)
            return path
        finally:
            temporary.unlink(missing_ok=True)


def _claim(temporary: Path, path: Path) -> bool:
    """Give a complete file its name unless a file has that name."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        os.replace(temporary, path)
    return True


def write_text(path: str | Path, text: str, shared: bool = False, sync: bool = False) -> None:
    """Replace a file atomically with text in UTF-8 (see `write_whole`); names that are not Unicode are escaped."""
    write_whole(
        path, lambda part: part.write_text(text, encoding="utf-8", errors="backslashreplace"), sync, shared=shared
    )


def write_json(path: str | Path, value: Any, sync: bool = False) -> None:
    """Replace a file atomically with a JSON value, indented by one space (see `write_whole`)."""
    write_text(path, json.dumps(value, indent=1) + "\n", sync=sync)


def flush(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cache_folder(name: str) -> Path:
    """The user's folder for data that can be computed again: `$XDG_CACHE_HOME/evotok/NAME`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "evotok" / name
