"""Where conversations come from: JSON, JSONL, parquet, WebDataset shards and Hugging Face data sets.

Every source is addressed by number and held as the places of its rows: a row is read when it is asked for, an image
only when it is encoded. So a set of many millions of rows costs some bytes a row, any number of processes reads it at
once, and a run that is resumed goes on at any row.
"""

import hashlib
import json
import mmap
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from evotok_plugin.data.images import IMAGE_SUFFIXES, open_picture
from evotok_plugin.data.sources import (
    FilesInPlace,
    PackedStrings,
    is_saved_dataset,
    load_hub,
    load_parquet,
    load_saved,
    matching_files,
    scan_shards,
    shard_members,
    split_member_name,
)
from llava_ext.data.records import Record, RowOptions, parse_row


class RecordSource(Protocol):
    """Rows 0..len-1 and the records and images that are in them."""

    name: str

    def __len__(self) -> int: ...

    def row_name(self, index: int) -> str:
        """What reports call a row: unique within a run."""

    def records(self, index: int) -> tuple[Record, ...]:
        """What a row says; ValueError if it is unusable. A row is one record, but for a caption with several tasks.
        The records of a row have the same images."""

    def picture(self, index: int, number: int) -> Image.Image:
        """Image `number` of a row, as RGB; ValueError if it is missing or broken."""


def open_records(spec: str | Path, options: RowOptions) -> RecordSource:
    """The source that an entry of `data_path` means.

    Args:
        spec: `.json` (a list of records) or `.jsonl` files (one a line); `.parquet` files; `.tar` shards; a folder of
            parquet files or of shards, or one written by `datasets`' `save_to_disk`; `hf:NAME[[:CONFIGURATION]:SPLIT]`.
            A pattern (`shards/{000..127}.tar`, `part-*.parquet`) means all its files.

    Raises:
        ValueError: nothing there, or nothing that can be understood.
    """
    spec = str(spec)
    if spec.startswith("hf:"):
        return DatasetRecords(load_hub(spec), spec, options)
    path = Path(spec)
    if path.is_dir() and is_saved_dataset(path):
        return DatasetRecords(load_saved(path), spec, options)
    files = sorted(path.glob("*.tar")) or sorted(path.glob("*.parquet")) if path.is_dir() else matching_files(spec)
    if not files and path.is_dir():
        raise ValueError(
            f"data folder {spec} holds neither .tar shards nor .parquet files nor a saved data set; "
            "name JSON files one by one or as a pattern"
        )
    if not files:
        raise ValueError(f"data file {spec} does not exist; expected .json, .jsonl, .parquet, .tar or hf:NAME")
    suffixes = {file.suffix for file in files}
    if suffixes <= {".json", ".jsonl"}:
        return JsonRecords(files, spec, options)
    if suffixes == {".parquet"}:
        return DatasetRecords(load_parquet(files, spec), spec, options, _parquet_parts(files))
    if suffixes == {".tar"}:
        return TarRecords(files, spec, options)
    raise ValueError(
        f"data {spec}: expected .json, .jsonl, .parquet or .tar files, found {', '.join(sorted(suffixes))}"
    )


def _open_named(name: str, options: RowOptions) -> Image.Image:
    return open_picture(options.image_folder / name)


def _numbered(index: int, row: object) -> str:
    """A row's number and, where it has one, its id; ids alone are not unique in published sets."""
    identity = row.get("id") if isinstance(row, dict) else None
    return str(index) if identity is None else f"{index} ({identity})"


# JSON --------------------------------------------------------------------------------------------------------

_STRING_OR_BRACKET = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', re.DOTALL)


class JsonRecords:
    """JSON and JSONL files, read in place.

    Raises:
        ValueError: a file that is no list of records.
    """

    def __init__(self, files: Sequence[Path], name: str, options: RowOptions) -> None:
        self.name, self._options = name, options
        self._files, self._file_names = FilesInPlace(files), [str(file) for file in files]
        spans = [_lines_of(file) if file.suffix == ".jsonl" else _objects_of(file) for file in files]
        self._spans = np.concatenate(spans)  # (rows, 2): where a row starts and ends in its file
        self._starts = np.cumsum([0, *map(len, spans)])

    def __len__(self) -> int:
        return len(self._spans)

    def row_name(self, index: int) -> str:
        file, number = self._place(index)
        try:
            row = self._row(index)
        except ValueError:
            row = None
        return f"{self._file_names[file]}:{_numbered(number, row)}"

    def records(self, index: int) -> tuple[Record, ...]:
        return parse_row(self._row(index), self._options)

    def picture(self, index: int, number: int) -> Image.Image:
        return _open_named(self.records(index)[0].images[number], self._options)

    def _place(self, index: int) -> tuple[int, int]:
        file = int(np.searchsorted(self._starts, index, side="right")) - 1
        return file, index - int(self._starts[file])

    def _row(self, index: int) -> object:
        start, end = self._spans[index].tolist()
        content = self._files.read(self._place(index)[0], start, end - start)
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError, too
            raise ValueError(f"not valid JSON: {error}") from error


def _lines_of(file: Path) -> np.ndarray:
    """Start and end in bytes of the lines that are not blank, (rows, 2)."""
    spans, start = [], 0
    with file.open("rb") as lines:
        for line in lines:
            if line.strip():
                spans.append((start, start + len(line)))
            start += len(line)
    return _as_spans(spans, file)


def _objects_of(file: Path) -> np.ndarray:
    """Start and end in bytes of the objects of a JSON list, (rows, 2), found by their brackets: a set of gigabytes is
    never held as objects. What is inside is checked row by row."""
    if not file.stat().st_size:
        raise ValueError(f"data file {file} is empty; expected a list of records")
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        spans, between, depth, start = [], b"[", 0, 0
        for match in _STRING_OR_BRACKET.finditer(content):
            symbol = content[match.start()]
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
            raise ValueError(f"data file {file} is not valid JSON: it ends within record {len(spans)}; was it cut off?")
        _check_between(content[start:], b"]" if spans else b"[]", start, file)
    return _as_spans(spans, file)


def _check_between(found: bytes, expected: bytes, start: int, file: Path) -> None:
    found = b"".join(found.removeprefix(b"\xef\xbb\xbf" if not start else b"").split())
    if found != expected:
        raise ValueError(
            f"data file {file} is not valid JSON: expected a list of records, with {expected.decode()!r} at byte "
            f"{start}, found {found[:40].decode(errors='replace')!r}; one record a line is a .jsonl file"
        )


def _as_spans(spans: list[tuple[int, int]], file: Path) -> np.ndarray:
    if not spans:
        raise ValueError(f"data file {file}: expected a non-empty list of records, it holds none")
    return np.array(spans, np.int64)


# WebDataset --------------------------------------------------------------------------------------------------


class TarRecords:
    """WebDataset tar shards, read in place. A row is a sample: its `.json` is the row as a JSON file has it, or its
    `.txt` a caption, and its images (`.jpg`, or `.0.jpg`, `.1.png`, ...) are those of the row, in the order of their
    numbers. A sample without images may name some of the image folder.

    Raises:
        ValueError: a shard that is missing, broken or compressed.
    """

    def __init__(self, shards: Sequence[Path], name: str, options: RowOptions) -> None:
        self.name, self._options, self._files = name, options, FilesInPlace(shards)
        members = scan_shards(shards, shard_members)
        parts = [_samples_of(*shard) for shard in zip(shards, members, strict=True)]
        self._shard_names = [str(file) for file in shards]
        self._shard_keys = [f"{file.stem}-{part.digest}" for file, part in zip(shards, parts, strict=True)]
        self._shard = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part.keys) for part in parts])
        self._keys = PackedStrings(key for part in parts for key in part.keys)
        self._member_starts = np.cumsum([0, *(count for part in parts for count in part.num_members)])
        self._suffixes = PackedStrings(suffix for part in parts for suffix in part.suffixes)
        self._places = np.concatenate([part.places for part in parts])  # (members, 2): offset and size
        if not len(self._keys):
            raise ValueError(f"data {name}: no samples (.json or .txt, and images) in {len(shards)} shards")

    def __len__(self) -> int:
        return len(self._keys)

    def row_name(self, index: int) -> str:
        return f"{self._shard_names[self._shard[index]]}:{self._keys[index]}"

    def records(self, index: int) -> tuple[Record, ...]:
        members = self._members(index)
        if repeated := {suffix for suffix, _ in members if [s for s, _ in members].count(suffix) > 1}:
            raise ValueError(f"the sample occurs twice in the shard ({', '.join(sorted(repeated))})")
        row = self._row(index, dict(members))
        shard = self._shard_keys[self._shard[index]]
        images = [f"{shard}/{self._keys[index]}.{suffix}" for suffix, _ in _images_first_to_last(members)]
        return parse_row(row, self._options, images)

    def picture(self, index: int, number: int) -> Image.Image:
        images = _images_first_to_last(self._members(index))
        if not images:
            return _open_named(self.records(index)[0].images[number], self._options)
        suffix, member = images[number]
        return open_picture(self._read(index, member), f"{self.row_name(index)}.{suffix}")

    def _members(self, index: int) -> list[tuple[str, int]]:
        """Suffix and number of each member of a sample."""
        first, end = self._member_starts[index : index + 2].tolist()
        return [(self._suffixes[member], member) for member in range(first, end)]

    def _read(self, index: int, member: int) -> bytes:
        offset, size = self._places[member].tolist()
        return self._files.read(int(self._shard[index]), offset, size)

    def _row(self, index: int, members: dict[str, int]) -> object:
        row = {}
        try:
            if "json" in members:
                row = json.loads(self._read(index, members["json"]))
            if "txt" in members and isinstance(row, dict):  # the .json may hold notes on the image alone
                row = {"caption": self._read(index, members["txt"]).decode(), **row}
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not valid JSON or text: {error}") from error
        return row


@dataclass(frozen=True)
class _Samples:
    """The samples of one shard: their keys, how many members each has, the members' suffixes, and their offsets and
    sizes (members, 2). `digest` tells the shard from others of the same name."""

    keys: list[str]
    num_members: list[int]
    suffixes: list[str]
    places: np.ndarray
    digest: str


def _samples_of(shard: Path, members: dict[str, list]) -> _Samples:
    samples: dict[str, list[int]] = {}
    for number, name in enumerate(members["names"]):
        key, suffix = split_member_name(name)
        is_wanted = suffix in ("json", "txt") or f".{suffix}".lower().endswith(IMAGE_SUFFIXES)
        if is_wanted and not key.endswith("/") and key:
            samples.setdefault(key, []).append(number)
    order = [number for numbers in samples.values() for number in numbers]
    places = np.array([members["offsets"], members["sizes"]], np.int64).reshape(2, -1).T
    return _Samples(
        keys=list(samples),
        num_members=[len(numbers) for numbers in samples.values()],
        suffixes=[split_member_name(members["names"][number])[1] for number in order],
        places=places[order],
        digest=hashlib.sha256(json.dumps(members).encode() + _both_ends(shard)).hexdigest()[:12],
    )


def _both_ends(file: Path, size: int = 65_536) -> bytes:
    """The first and the last bytes of a file."""
    with file.open("rb") as content:
        first = content.read(size)
        content.seek(max(0, file.stat().st_size - size))
        return first + content.read(size)


def _images_first_to_last(members: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    """Those members that are images, by suffix: `0.jpg`, `1.png`, ..., `10.jpg`."""
    images = [member for member in members if f".{member[0]}".lower().endswith(IMAGE_SUFFIXES)]
    by_number = [(re.split(r"(\d+)", suffix), suffix, member) for suffix, member in images]
    natural = sorted(by_number, key=lambda one: [int(t) if t.isdigit() else t for t in one[0]])
    return [(suffix, member) for _, suffix, member in natural]


# Parquet and data sets ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Parts:
    """Names of files and the number of the first row of each."""

    names: list[str]
    starts: np.ndarray


class DatasetRecords:
    """A Hugging Face data set with columns as `parse_row` names them. An image is bytes, `{"bytes", "path"}` (as
    `datasets.Image` has it), or a path below the image folder; `image` holds one or several, `images` several.

    Bytes of images are not touched but to decode them.

    Args:
        parts: the names of the files that the rows are in, and in which rows they start; keys of images then do not
            change when files are added.

    Raises:
        ValueError: no column of conversations or captions.
    """

    def __init__(self, dataset: Any, name: str, options: RowOptions, parts: _Parts | None = None) -> None:
        self.name, self._options = name, options
        columns = dataset.column_names
        if not {"conversations", "messages", "caption", "text"} & set(columns):
            raise ValueError(
                f"data {name}: no column 'conversations', 'messages', 'caption' or 'text'; its columns are "
                f"{', '.join(columns)}"
            )
        self._image_columns = [column for column in ("images", "image") if column in columns]
        self._text_columns = [c for c in ("id", "conversations", "messages", "caption", "text") if c in columns]
        self._rows = dataset.select_columns(self._text_columns + self._image_columns).with_format("arrow")
        self._parts = parts or _Parts([f"{dataset._fingerprint}"], np.zeros(1, np.int64))
        if not len(dataset):
            raise ValueError(f"data {name} is empty")

    def __len__(self) -> int:
        return len(self._rows)

    def row_name(self, index: int) -> str:
        row = self._rows[int(index)]
        identity = row.column("id")[0].as_py() if "id" in self._text_columns else None
        return f"{self.name}:{_numbered(index, {'id': identity})}"

    def records(self, index: int) -> tuple[Record, ...]:
        table = self._rows[int(index)]
        (row,) = table.select(self._text_columns).to_pylist()
        images = self._stored_images(table)
        embedded = [number for number, image in enumerate(images) if _bytes_of(image) is not None]
        if embedded and len(embedded) < len(images):
            raise ValueError(f"{len(images) - len(embedded)} of {len(images)} images are not in the row")
        row["images"] = [] if embedded else [_path_of(image) for image in images]
        return parse_row(row, self._options, [f"{self._key(index)}.{number}" for number in embedded])

    def picture(self, index: int, number: int) -> Image.Image:
        content = _bytes_of(self._stored_images(self._rows[int(index)])[number])
        if content is None:
            return _open_named(self.records(index)[0].images[number], self._options)
        return open_picture(content.as_py(), f"{self.name} row {index}, image {number}")

    def _stored_images(self, table: Any) -> list[Any]:
        """The images of a row as Arrow has them, none of them read."""
        import pyarrow

        for column in self._image_columns:
            value = table.column(column)[0]
            if value.is_valid:
                several = value.values if isinstance(value, pyarrow.ListScalar) else [value]
                return [image for image in several if image.is_valid]
        return []

    def _key(self, index: int) -> str:
        part = int(np.searchsorted(self._parts.starts, index, side="right")) - 1
        return f"{self._parts.names[part]}/{index - int(self._parts.starts[part])}"


def _field(image: Any, name: str) -> Any:
    """A part of an image that is kept as `{"bytes", "path"}`, or None."""
    value = image[name] if name in image.type.names else None
    return value if value is not None and value.is_valid else None


def _bytes_of(image: Any) -> Any:
    """The Arrow scalar of an image's bytes, or None."""
    import pyarrow

    if isinstance(image, pyarrow.StructScalar):
        return _field(image, "bytes")
    return image if pyarrow.types.is_binary(image.type) or pyarrow.types.is_large_binary(image.type) else None


def _path_of(image: Any) -> Any:
    import pyarrow

    path = _field(image, "path") if isinstance(image, pyarrow.StructScalar) else image
    return None if path is None else path.as_py()


def _parquet_parts(files: Sequence[Path]) -> _Parts:
    """Parquet files by name and a digest of their footers, which hold the places and extremes of all they contain."""
    import pyarrow.parquet

    names, counts = [], []
    for file in files:
        counts.append(pyarrow.parquet.read_metadata(file).num_rows)
        with file.open("rb") as content:
            content.seek(-8, os.SEEK_END)
            length = int.from_bytes(content.read(4), "little")
            content.seek(-8 - length, os.SEEK_END)
            names.append(f"{file.stem}-{hashlib.sha256(content.read(length)).hexdigest()[:12]}")
    return _Parts(names, np.cumsum([0, *counts[:-1]]))
