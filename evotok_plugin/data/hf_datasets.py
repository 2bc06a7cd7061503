"""Hugging Face datasets as sources of images: saved folders, parquet files and the Hub."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from evotok_plugin.common.foreign_files import describe_error
from evotok_plugin.data.bad_samples import shorten
from evotok_plugin.data.files import content_digest, file_state, local_path, path_below, read_file, stamp_of
from evotok_plugin.data.images import embedded_content, is_embedded, open_picture
from evotok_plugin.errors import UserError


class DatasetSource:
    """A split of a Hugging Face dataset with an image column; labels are its `label` column.

    An image is bytes, `{"bytes", "path"}` (as in `datasets.Image`), or a string: a path, a `file:` URL, a data URI or
    base64. The stamp of an embedded string depends on its content, the stamp of a path on the state of its file.

    Args:
        roots: folders that contain the files of all paths; data of others must not name other files of this machine.
            None accepts any path, for a dataset that the caller has made.

    Raises:
        UserError: the dataset has no image column, or its structs have no field `bytes`.
    """

    def __init__(self, dataset: Any, name: str, roots: Sequence[Path] | None = None) -> None:
        import datasets

        self.name, self._roots = name, roots
        column = next(
            (c for c, kind in dataset.features.items() if isinstance(kind, datasets.Image)),
            next((c for c in ("image", "jpg", "png", "webp") if c in dataset.features), None),
        )
        if column is None:
            raise UserError(f"{name!r} has no image column; its columns are {', '.join(dataset.features)}")
        if isinstance(dataset.features[column], datasets.Image):
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
        elif isinstance(dataset.features[column], dict) and "bytes" not in dataset.features[column]:
            raise UserError(
                f"{name!r}: expected column {column!r} to hold bytes, strings, or structs of bytes and path, "
                f"got structs of {', '.join(dataset.features[column])}"
            )
        self._images = dataset.select_columns([column])
        self._column = column
        self._labels = dataset["label"] if "label" in dataset.features else None
        self._names = getattr(dataset.features.get("label"), "names", None)
        self._place = os.path.abspath(name) if os.path.exists(name) else name
        self._state = dataset._fingerprint
        self._arrow = None if _is_embedded(self._images, column) else self._images.with_format("arrow")

    def __len__(self) -> int:
        return len(self._images)

    def key(self, index: int) -> str:
        return f"{index:09d}"

    def picture(self, index: int) -> Image.Image:
        return open_picture(self.content(index), f"{self.name} row {index}")

    def content(self, index: int) -> bytes:
        try:
            content = self._images[int(index)][self._column]
        except Exception as error:  # pyarrow raises many types for damaged values
            raise UserError(f"image of {self.name} row {index} cannot be read: {describe_error(error)}") from error
        if isinstance(content, dict):
            content = content["bytes"] or content.get("path")
        if isinstance(content, str):
            return self._content_of(content, f"{self.name} row {index}")
        if not isinstance(content, bytes):
            raise UserError(
                f"image {self.key(index)!r} of {self.name!r} is missing: expected bytes or a string, "
                f"got {type(content).__name__}"
            )
        return content

    def stamp(self, index: int) -> bytes:
        place = f"{self._place}/{index}"
        if self._arrow is None:
            return stamp_of(place, self._state)
        try:
            value = self._arrow[int(index)].column(0)[0].as_py()  # a path, or a missing image
        except Exception:  # a damaged value; `content` says so
            return stamp_of(place, self._state)
        text = (None if value.get("bytes") else value.get("path")) if isinstance(value, dict) else value
        if not isinstance(text, str):
            return stamp_of(place, self._state)
        if is_embedded(text):
            return stamp_of(place, content_digest(text.encode(errors="surrogatepass")))
        return stamp_of(place, self._state, *self._state_of(text))

    def label(self, index: int) -> str | None:
        if self._labels is None:
            return None
        value = self._labels[int(index)]
        return self._names[value] if self._names and isinstance(value, int) and value >= 0 else str(value)

    def groups(self) -> None:
        return None

    def _content_of(self, text: str, name: str) -> bytes:
        """Content of the image that a string contains or names; `name` identifies the row in errors."""
        try:
            content = embedded_content(text)
            path = self._path_of(text) if content is None else ""
        except UserError as error:
            raise UserError(f"image of {name} ({shorten(text)}) cannot be read: {error}") from error
        return read_file(path, f"{name}: {text}") if content is None else content

    def _path_of(self, text: str) -> str:
        path = local_path(text)
        return path if self._roots is None else path_below(path, self._roots, "embed its bytes, or move it there")

    def _state_of(self, text: str) -> tuple[int, ...]:
        try:
            return file_state(self._path_of(text))
        except UserError:  # a URL or a path that cannot be read
            return ()


def _is_embedded(images: Any, column: str) -> bool:
    """Whether every row contains the bytes of its image; they are not read."""
    import pyarrow
    import pyarrow.compute

    stored = images.data.column(column)
    if pyarrow.types.is_struct(stored.type):
        stored = pyarrow.compute.struct_field(stored, "bytes")
    return stored.null_count == 0 and not pyarrow.types.is_string(stored.type)


def _import_datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"datasets and parquet files need datasets ({error}): pip install datasets") from error
    return datasets


def is_saved_dataset(folder: Path) -> bool:
    """Whether a folder was written by `save_to_disk` of `datasets`.

    Raises:
        UserError: it contains several splits.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(path.parent.name for path in folder.glob("*/state.json"))
        raise UserError(f"{str(folder)!r} contains several splits of a dataset ({', '.join(splits)}); name one of them")
    return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()


def load_saved(folder: Path) -> Any:
    """Open a `datasets.Dataset` written by `save_to_disk`.

    Raises:
        UserError: it is broken.
    """
    datasets = _import_datasets()
    try:
        return datasets.load_from_disk(str(folder))
    except Exception as error:  # pyarrow raises many types for broken files
        cause = describe_error(error)
        raise UserError(f"{str(folder)!r} cannot be loaded as a saved dataset: {cause}; save it again") from error


def load_parquet(files: Sequence[Path], name: str) -> Any:
    """Open parquet files as one memory-mapped `datasets.Dataset`.

    Raises:
        UserError: one of them is broken.
    """
    datasets = _import_datasets()
    try:
        return datasets.load_dataset("parquet", data_files=[str(file) for file in files], split="train")
    except Exception as error:  # pyarrow raises many types for broken files
        cause = describe_error(_first_cause(error))
        raise UserError(f"{name!r} cannot be read as parquet: {cause}; write or copy it again") from error


def _first_cause(error: BaseException) -> BaseException:
    """The error that `datasets` hides behind one of its own, which names the cause."""
    return _first_cause(error.__cause__) if error.__cause__ is not None else error


def load_hub(spec: str) -> Any:
    """Load a dataset from the Hub: `hf:NAME`, `hf:NAME:SPLIT` or `hf:NAME:CONFIGURATION:SPLIT`.

    Raises:
        UserError: it cannot be loaded.
    """
    datasets = _import_datasets()
    _, name, *rest = spec.split(":")
    split, configuration = (rest[-1] if rest else "train"), (rest[0] if len(rest) > 1 else None)
    try:
        return datasets.load_dataset(name, configuration, split=split)
    except Exception as error:  # no network, unknown dataset or split
        raise UserError(f"dataset {spec!r} cannot be loaded: {error}") from error
