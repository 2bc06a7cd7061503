"""The border to files that other programs wrote or damaged: regular files only, bounded, and one error for any cause.

A parser of another library may raise anything. `reading` turns it into one UserError that names the file, the cause and
the remedy; `read_text` and `parse_json` do so for text.
"""

import contextlib
import errno
import io
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evotok_plugin.errors import UserError

LARGEST_TEXT = 1 << 30  # bytes of a file that is read as a whole
_LONGEST = 300  # characters of an error message of another library
_PANIC = "PanicException"  # raised by libraries in Rust; it is a BaseException


def describe_error(error: BaseException | str, what: str | Path = "") -> str:
    """The message of another library's error as one line of limited length.

    Args:
        what: the file that the message is about, which is then not named again.
    """
    if isinstance(error, OSError) and error.strerror:
        is_named = error.filename is None or str(error.filename) == str(what)
        return error.strerror if is_named else f"{error.filename}: {error.strerror}"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, KeyError):
        text = f"{text} is missing"
    text = text.encode(errors="backslashreplace").decode()
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


@contextlib.contextmanager
def reading(what: str | Path, remedy: str = "", verb: str = "loaded") -> Iterator[None]:
    """Turn any exception of another library's reader into a UserError; a UserError of ours gets the name of the file.

    Args:
        what: the file or folder being read, for the error message.
        remedy: what the user can do, for the error message.
        verb: what cannot be done with the file.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != _PANIC:
            raise
        if isinstance(error, UserError) and str(error).startswith(str(what)):
            raise  # it names the file already
        cause = "there is not enough memory" if isinstance(error, MemoryError) else describe_error(error, what)
        advice = f"; {remedy}" if remedy else ""
        raise UserError(f"{what} cannot be {verb}: {cause}{advice}") from error


def open_regular(path: str | os.PathLike) -> io.BufferedReader:
    """Open a regular file for reading. Other files are rejected at once: a pipe would wait for a writer.

    Raises:
        OSError: the file does not exist, cannot be read, or is a folder, a pipe or a device.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:  # a NUL character
        raise OSError(errno.EINVAL, str(error), str(path)) from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise OSError(errno.EINVAL, f"it is {kind}, expected a file", str(path))
    return os.fdopen(descriptor, "rb")


def read_bytes(path: str | os.PathLike, limit: int = LARGEST_TEXT) -> bytes:
    """Read a regular file as a whole.

    Raises:
        OSError: as `open_regular`, or the file has more than `limit` bytes.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise OSError(errno.EFBIG, f"it has {size} bytes, the limit is {limit}", str(path))
        return file.read()


def read_text(path: str | os.PathLike, remedy: str = "restore or save it again") -> str:
    """Read a regular file as UTF-8, with or without a byte order mark.

    Raises:
        UserError: it cannot be read or decoded.
    """
    with reading(Path(path), remedy, "read"):
        return decoded(read_bytes(path))


def decoded(content: bytes) -> str:
    """Decode UTF-8 with or without a byte order mark, with the line ends of `Path.read_text`.

    Raises:
        UnicodeDecodeError: the content is not UTF-8.
    """
    return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: str | os.PathLike, kind: type | None = dict, remedy: str = "restore or save it again") -> Any:
    """Read the JSON value in a file.

    Args:
        kind: the expected type; None for any.

    Raises:
        UserError: the file cannot be read, is not JSON, or holds a value of another type.
    """
    text = read_text(path, remedy)
    with reading(Path(path), remedy, "read as JSON"):
        value = json.loads(text)
    if kind is not None and not isinstance(value, kind):
        expected = "an object" if kind is dict else "a list" if kind is list else kind.__name__
        raise UserError(f"{path} cannot be read: expected {expected} in JSON, got {type(value).__name__}; {remedy}")
    return value


def readable_json(path: str | os.PathLike) -> dict[str, Any] | None:
    """The JSON object in a file, or None if it is missing or damaged."""
    try:
        return read_json(path)
    except UserError:
        return None
