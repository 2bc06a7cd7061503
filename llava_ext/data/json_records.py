"""Records of JSON and JSONL files, read in place."""

import json
import mmap
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from evotok_plugin.common.foreign_files import open_regular
from evotok_plugin.data.bad_samples import shorten
from evotok_plugin.data.images import open_picture
from evotok_plugin.data.tar_shards import FilesInPlace
from evotok_plugin.errors import UserError
from llava_ext.data.records import CAPTIONS, TURNS, Record, RowOptions, named_image, parse_row


def numbered(index: int, row: object) -> str:
    """The number of a row and its id, if it has one; ids alone are not unique in published data sets."""
    identity = row.get("id") if isinstance(row, dict) else None
    if identity is None:
        return str(index)
    text = str(identity)
    return f"{index} ({text if len(text) <= 100 else shorten(text)})"


# The possessive repeat keeps a string without an end linear: it matches once, to the end of the file. Group 1 is then
# empty.
_STRING_OR_BRACKET = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+("?)|[\[\]{}]', re.DOTALL)
_BOM = b"\xef\xbb\xbf"


class JsonRecords:
    """Records of JSON and JSONL files, read in place.

    A file holds a list of records, one record per line, or a single record, as detected from its content, not from its
    suffix.

    Raises:
        UserError: a file cannot be read or does not hold records.
    """

    def __init__(self, files: Sequence[Path], name: str, options: RowOptions) -> None:
        self.name, self._options = name, options
        self._files, self._file_names = FilesInPlace(files), [str(file) for file in files]
        spans = [_rows_of(file) for file in files]
        self._spans = np.concatenate(spans)  # (rows, 2): start and end of each row in its file, in bytes
        self._starts = np.cumsum([0, *map(len, spans)])

    def __len__(self) -> int:
        return len(self._spans)

    def row_name(self, index: int) -> str:
        file, number = self._place(index)
        try:
            row = self.row(index)
        except UserError:
            row = None
        return f"{self._file_names[file]}:{numbered(number, row)}"

    def records(self, index: int) -> tuple[Record, ...]:
        return parse_row(self.row(index), self._options)

    def content(self, index: int, number: int) -> bytes:
        return named_image(self.row(index), self._options, number).content()

    def picture(self, index: int, number: int) -> Image.Image:
        image = named_image(self.row(index), self._options, number)
        return open_picture(image.content(), image.key)

    def row(self, index: int) -> object:
        """A row as the file has it.

        Raises:
            UserError: it is not valid JSON.
        """
        start, end = self._spans[index].tolist()
        content = self._files.read(self._place(index)[0], start, end - start)
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
            raise UserError(f"not valid JSON: {error}") from error

    def _place(self, index: int) -> tuple[int, int]:
        """The file of a row and the number of the row within it."""
        file = int(np.searchsorted(self._starts, index, side="right")) - 1
        return file, index - int(self._starts[file])


def _rows_of(file: Path) -> np.ndarray:
    """Start and end in bytes of the rows of a file, (rows, 2).

    Raises:
        UserError: the file cannot be read or does not hold records.
    """
    try:
        return _detect_rows(file)
    except OSError as error:
        raise UserError(f"data file {file} cannot be read: {error.strerror or error}") from error


def _detect_rows(file: Path) -> np.ndarray:
    with open_regular(file) as opened:
        head = opened.read(1 << 16)
    if not head:
        raise UserError(f"data file {file} is empty; expected a list of records")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"data file {file} is UTF-16 text; save it as UTF-8")
    first = head.removeprefix(_BOM).lstrip()
    if first.startswith(b"["):
        return _objects_of(file)
    if file.suffix.lower() != ".json" or _starts_with_a_row(file):
        return _lines_of(file)
    if first.startswith(b"{") and (row := _only_record(file)) is not None:
        return row
    return _objects_of(file)


def _starts_with_a_row(file: Path) -> bool:
    """Whether the first non-blank line is a complete JSON object and more lines follow."""
    with file.open("rb") as lines:
        line = next((line for line in lines if line.removeprefix(_BOM).strip()), b"")
        more = any(line.strip() for line in lines)
    try:
        return more and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _only_record(file: Path) -> np.ndarray | None:
    """The span of the file, (1, 2), if it is a single record; an object of several records is an error."""
    content = file.read_bytes()
    try:
        row = json.loads(content)
    except (ValueError, RecursionError):
        return None
    if any(name in row for name in (*TURNS, *CAPTIONS)):
        return np.array([[0, len(content)]], np.int64)
    held = [value for value in row.values() if isinstance(value, dict) and any(name in value for name in TURNS)]
    if held:
        raise UserError(
            f"data file {file}: expected a list of records, found an object of {len(held)} records; write its "
            "values as a list, with their keys as 'id'"
        )
    return None


def _lines_of(file: Path) -> np.ndarray:
    """Start and end in bytes of the non-blank lines, (rows, 2)."""
    spans, start = [], 0
    with file.open("rb") as lines:
        for line in lines:
            if (line if start else line.removeprefix(_BOM)).strip():
                spans.append((start, start + len(line)))
            start += len(line)
    return _as_spans(spans, file)


def _objects_of(file: Path) -> np.ndarray:
    """Start and end in bytes of the objects of a JSON list, (rows, 2).

    Only brackets are matched, so that a file of gigabytes is never parsed as one; each row is validated when it is
    read.
    """
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        spans: list[tuple[int, int]] = []
        between, depth, start = b"[", 0, 0
        for match in _STRING_OR_BRACKET.finditer(content):
            symbol = content[match.start()]
            if match[1] == b"":
                raise UserError(
                    f"data file {file} is not valid JSON: the quote at byte {match.start()}, in record {len(spans)}, "
                    "is not closed; is it truncated?"
                )
            if symbol in b"[{":
                depth += 1
                if depth == 2:
                    _check_between(content[start : match.start()], between, start, file)
                    start, between = match.start(), b","
            elif symbol in b"]}":
                depth -= 1
                if depth == 1:
                    spans.append((start, match.end()))
                    start = match.end()
                elif depth == 0:
                    break
        if depth:
            raise UserError(f"data file {file} is not valid JSON: it ends within record {len(spans)}; is it truncated?")
        _check_between(content[start:], b"]" if spans else b"[]", start, file)
    return _as_spans(spans, file)


def _check_between(found: bytes, expected: bytes, start: int, file: Path) -> None:
    found = b"".join(found.removeprefix(_BOM if not start else b"").split())
    if found != expected:
        raise UserError(
            f"data file {file} is not valid JSON: expected a list of records, with {expected.decode()!r} at byte "
            f"{start}, found {found[:40].decode(errors='replace')!r}; use .jsonl for one record per line"
        )


def _as_spans(spans: list[tuple[int, int]], file: Path) -> np.ndarray:
    if not spans:
        raise UserError(f"data file {file}: expected a non-empty list of records, found no records")
    return np.array(spans, np.int64)
