"""Records of parquet files and Hugging Face data sets."""

import contextlib
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from evotok_plugin.common.foreign_files import describe_error, reading
from evotok_plugin.data.files import file_state, stamp_of
from evotok_plugin.data.images import open_picture
from evotok_plugin.errors import UserError
from llava_ext.data.json_records import numbered
from llava_ext.data.records import CAPTIONS, TURNS, UNSUPPORTED, Record, RowOptions, named_image, parse_row
from llava_ext.prompts.image_parts import is_empty


@dataclass(frozen=True)
class Parts:
    """The files of a data set: names, the number of the first row of each, and states (`file_state`)."""

    names: list[str]
    starts: np.ndarray
    states: list[tuple[int, ...]]


class DatasetRecords:
    """Records of a Hugging Face data set whose columns are the fields of `parse_row`.

    An image is bytes, `{"bytes", "path"}` (as in `datasets.Image`) or a path below the image folder; `image` holds one
    or several, `images` several. The bytes of an image are only read to decode it.

    Args:
        parts: the files that hold the rows; keys of images then stay the same when files are added.

    Raises:
        UserError: the data set is empty or has no column of conversations or captions.
    """

    def __init__(self, dataset: Any, name: str, options: RowOptions, parts: Parts | None = None) -> None:
        self.name, self._options = name, options
        columns = dataset.column_names
        if not {*TURNS, *CAPTIONS} & set(columns):
            raise UserError(
                f"data {name}: no column 'conversations', 'messages', 'caption' or 'text'; its columns are "
                f"{', '.join(columns)}"
            )
        self._image_columns = [column for column in ("images", "image") if column in columns]
        self._text_columns = [c for c in ("id", "drawn", *TURNS, *CAPTIONS) if c in columns]
        self._other_columns = [c for c in UNSUPPORTED if c in columns]
        wanted = self._text_columns + self._image_columns + self._other_columns
        self._rows = dataset.select_columns(wanted).with_format("arrow")
        self._parts = parts or Parts([f"{dataset._fingerprint}"], np.zeros(1, np.int64), [()])
        if not len(dataset):
            raise UserError(f"data {name} is empty")

    def __len__(self) -> int:
        return len(self._rows)

    def row_name(self, index: int) -> str:
        identity = None
        if "id" in self._text_columns:
            with contextlib.suppress(Exception):  # the value cannot be decoded
                identity = self._rows[int(index)].column("id")[0].as_py()
        return f"{self.name}:{numbered(index, {'id': identity})}"

    def records(self, index: int) -> tuple[Record, ...]:
        row, images = self._row_and_images(index)
        keys = [f"{self._key(index)}.{number}" for number in range(len(images))]
        state = self._parts.states[self._part_of(index)]
        return parse_row(row, self._options, keys, [stamp_of(key, state) for key in keys])

    def content(self, index: int, number: int) -> bytes:
        row, images = self._row_and_images(index)
        if not images:
            return named_image(row, self._options, number).content()
        return _bytes_of(images[number]).as_py()

    def picture(self, index: int, number: int) -> Image.Image:
        return open_picture(self.content(index, number), f"{self.name} row {index}, image {number}")

    def _row_and_images(self, index: int) -> tuple[dict, list[Any]]:
        """A row as `parse_row` expects it, and its embedded images as Arrow scalars, which are not read yet.

        Images that are not embedded are paths in the row.

        Raises:
            UserError: the row cannot be decoded, or some of its images are missing.
        """
        try:
            return self._decode_row(index)
        except UserError:
            raise
        except UnicodeDecodeError as error:
            raise UserError(f"not valid UTF-8: {error}") from error
        except Exception as error:  # pyarrow raises many types, such as for a date out of range or a damaged buffer
            raise UserError(f"the row cannot be decoded: {describe_error(error)}") from error

    def _decode_row(self, index: int) -> tuple[dict, list[Any]]:
        table = self._rows[int(index)]
        (row,) = table.select(self._text_columns).to_pylist()
        for column in self._other_columns:
            value = table.column(column)[0]
            row[column] = "given" if value.is_valid and not _is_empty_list(value) else None
        stored = self._stored_images(table)
        embedded = [image for image in stored if _bytes_of(image) is not None]
        if embedded and len(embedded) < len(stored):
            raise UserError(f"{len(stored) - len(embedded)} of {len(stored)} images are not in the row")
        row["images"] = [] if embedded else [_path_of(image) for image in stored]
        return row, embedded

    def _stored_images(self, table: Any) -> list[Any]:
        """The images of a row as Arrow scalars; a column without images counts as absent."""
        found = {column: images for column in self._image_columns if (images := _images_in(table.column(column)[0]))}
        if len(found) == 2 and _contents_of(found["image"]) != _contents_of(found["images"]):
            raise UserError("'images' and 'image' hold different images; keep one of them")
        return next(iter(found.values()), [])

    def _part_of(self, index: int) -> int:
        return int(np.searchsorted(self._parts.starts, index, side="right")) - 1

    def _key(self, index: int) -> str:
        part = self._part_of(index)
        return f"{self._parts.names[part]}/{index - int(self._parts.starts[part])}"


def _is_empty_list(value: Any) -> bool:
    import pyarrow

    return isinstance(value, pyarrow.ListScalar) and not len(value.values)


def _images_in(value: Any) -> list[Any]:
    """The images in a value of an image column, an empty list if it is null or empty.

    Raises:
        UserError: some of several images are null or empty.
    """
    import pyarrow

    if not value.is_valid:
        return []
    several = list(value.values) if isinstance(value, pyarrow.ListScalar) else [value]
    given = [image for image in several if image.is_valid and (_bytes_of(image) or not is_empty(_path_of(image)))]
    if given and len(given) < len(several):
        raise UserError(f"{len(several) - len(given)} of {len(several)} images are empty")
    return given


def _contents_of(images: list[Any]) -> list[Any]:
    return [_path_of(image) if (content := _bytes_of(image)) is None else content.as_py() for image in images]


def _field(image: Any, name: str) -> Any:
    """A field of an image stored as `{"bytes", "path"}`, or None."""
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


def parquet_parts(files: Sequence[Path]) -> Parts:
    """Parquet files, named by stem and a digest of the footer, which has offsets and statistics of all columns."""
    import pyarrow.parquet

    names, counts = [], []
    for file in files:
        with reading(file, "write or copy it again", "read as parquet"):
            counts.append(pyarrow.parquet.read_metadata(file).num_rows)
        with file.open("rb") as content:
            content.seek(-8, os.SEEK_END)
            length = int.from_bytes(content.read(4), "little")
            content.seek(-8 - length, os.SEEK_END)
            names.append(f"{file.stem}-{hashlib.sha256(content.read(length)).hexdigest()[:12]}")
    return Parts(names, np.cumsum([0, *counts[:-1]]), [file_state(file) for file in files])
