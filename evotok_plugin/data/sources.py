"""Sources of images: folders, lists of files, tar shards (WebDataset), parquet and Hugging Face datasets.

A source returns images by index, so that readers can start anywhere: training resumes at a position, several processes
take disjoint parts, an unfinished code cache is completed. A tar shard is scanned once for the offsets of its members;
images are then read in place without unpacking.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from evotok_plugin.data.files import (
    Listing,
    described,
    existing,
    file_state,
    kind_of,
    list_folder,
    local_path,
    matching_files,
    read_file,
    refuse_compressed,
    report_skipped,
    stamp_of,
    suffix_of,
)
from evotok_plugin.data.hf_datasets import DatasetSource, is_saved_dataset, load_hub, load_parquet, load_saved
from evotok_plugin.data.images import IMAGE_SUFFIXES, open_picture
from evotok_plugin.data.keys import PackedStrings
from evotok_plugin.data.tar_shards import TarSource
from evotok_plugin.errors import UserError

_HASH_SPACE = 10_000


class ImageSource(Protocol):
    """Images 0..len-1. Keys are unique within a source and the same in every run.

    `stamp` and `content` identify images for caches. A source whose images are not files may lack both; its images are
    then identified by their keys.
    """

    name: str

    def __len__(self) -> int: ...

    def key(self, index: int) -> str:
        """The image's name."""

    def picture(self, index: int) -> Image.Image:
        """The image as RGB; raises UserError if it is missing or broken."""

    def stamp(self, index: int) -> bytes:
        """16 bytes (`stamp_of`) that identify the image's location and state; the image is not read."""

    def content(self, index: int) -> bytes:
        """Content of the image's file; raises UserError if it cannot be read."""

    def label(self, index: int) -> str | None:
        """Class of the image, or None if the source has no classes."""

    def groups(self) -> np.ndarray | None:
        """Number of the shard that contains each image (len,), or None if random access is cheap."""


def stamps_of(source: ImageSource, indices: Sequence[int]) -> np.ndarray:
    """Stamps of images (indices,); zeros for a source whose images are identified by their keys only."""
    stamp = getattr(source, "stamp", None)
    if stamp is None:
        return np.zeros(len(indices), "S16")
    return np.fromiter((stamp(index) for index in indices), "S16", len(indices))


class FileSource:
    """Image files: all files below a folder, or a list of files relative to it.

    Keys are paths relative to the folder; labels are the names of the files' parent folders, as in ImageNet's layout.

    Raises:
        UserError: the folder or the list contains no images.
    """

    def __init__(self, root: Path, names: Iterable[str] | None = None) -> None:
        self.name, self._root = str(root), root
        self._names = PackedStrings(_images_below(root) if names is None else names)
        if not len(self._names):
            raise UserError(f"{str(root)!r}: expected at least one image file, got none")

    def __len__(self) -> int:
        return len(self._names)

    def key(self, index: int) -> str:
        return self._names[index]

    def picture(self, index: int) -> Image.Image:
        return open_picture(self.content(index), str(self._root / self._names[index]))

    def content(self, index: int) -> bytes:
        return read_file(self._root / self._names[index])

    def stamp(self, index: int) -> bytes:
        path = os.path.abspath(self._root / self._names[index])
        return stamp_of(path, *file_state(path))

    def label(self, index: int) -> str | None:
        return Path(self._names[index]).parent.name or None

    def groups(self) -> None:
        return None


def _images_below(root: Path) -> list[str]:
    """Images in a folder and its subfolders; other files are reported."""
    listing = list_folder(root, deep=("image",))
    if not listing.files:
        raise UserError(
            f"{str(root)!r} contains no images ({', '.join(IMAGE_SUFFIXES)}); found {described(listing.others)}"
        )
    report_skipped(str(root), listing.others)
    return listing.files["image"]


class Subset:
    """Selected images of a source."""

    def __init__(self, source: ImageSource, indices: np.ndarray) -> None:
        self.name, self._source, self._indices = source.name, source, indices

    def __len__(self) -> int:
        return len(self._indices)

    def key(self, index: int) -> str:
        return self._source.key(int(self._indices[index]))

    def picture(self, index: int) -> Image.Image:
        return self._source.picture(int(self._indices[index]))

    def stamp(self, index: int) -> bytes:
        return self._source.stamp(int(self._indices[index]))

    def content(self, index: int) -> bytes:
        return self._source.content(int(self._indices[index]))

    def label(self, index: int) -> str | None:
        return self._source.label(int(self._indices[index]))

    def groups(self) -> np.ndarray | None:
        groups = self._source.groups()
        return None if groups is None else groups[self._indices]


class Concatenated:
    """Several sources in sequence; with more than one, each key begins with the name of its source."""

    def __init__(self, sources: Sequence[ImageSource]) -> None:
        self.name, self._sources = ", ".join(source.name for source in sources), list(sources)
        self._starts = np.cumsum([0, *(len(source) for source in sources)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _place(self, index: int) -> tuple[ImageSource, int]:
        which = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._sources[which], int(index - self._starts[which])

    def key(self, index: int) -> str:
        source, place = self._place(index)
        return f"{source.name}/{source.key(place)}" if len(self._sources) > 1 else source.key(place)

    def picture(self, index: int) -> Image.Image:
        source, place = self._place(index)
        return source.picture(place)

    def stamp(self, index: int) -> bytes:
        source, place = self._place(index)
        return source.stamp(place)

    def content(self, index: int) -> bytes:
        source, place = self._place(index)
        return source.content(place)

    def label(self, index: int) -> str | None:
        source, place = self._place(index)
        return source.label(place)

    def groups(self) -> None:
        return None


# Opening -----------------------------------------------------------------------------------------------------


def open_source(spec: str | Path) -> ImageSource:
    """Open the source that a command-line argument specifies.

    Args:
        spec: an image file; a folder of images; a `.tar` shard, a pattern of shards (`shards/{000..127}.tar`,
            `shards/*.tar`) or a folder of them; likewise with `.parquet`; a folder written by `datasets`'
            `save_to_disk`; `hf:NAME`, `hf:NAME:SPLIT` or `hf:NAME:CONFIGURATION:SPLIT`, a dataset from the Hugging Face
            Hub (the default split is `train`).

    Raises:
        UserError: the source does not exist, or its kind is not supported.
    """
    spec = str(spec)
    if spec.startswith("hf:"):
        return DatasetSource(load_hub(spec), spec, roots=())
    files = matching_files(spec)
    if not files:
        raise UserError(f"source {spec!r} does not exist; expected images, a folder, .tar shards, .parquet or hf:NAME")
    if len(files) == 1 and files[0].is_dir():
        return _open_folder(files[0])
    refuse_compressed(files)
    kinds = {"folder" if file.is_dir() else kind_of(file) for file in files}
    if kinds == {"tar"}:
        return TarSource(files, spec)
    if kinds == {"parquet"}:
        return DatasetSource(load_parquet(files, spec), spec, sorted({file.parent for file in files}))
    if len(files) == 1 and kinds != {"json"}:  # an image, whatever its suffix
        return FileSource(files[0].parent, [files[0].name])
    if kinds == {"image"}:
        return FileSource(Path(), map(str, files))
    found = described(Counter("folder" if file.is_dir() else suffix_of(file) for file in files))
    raise UserError(f"source {spec!r}: expected images, or .tar, or .parquet files, or one folder; found {found}")


def open_sources(specs: Sequence[str | Path]) -> ImageSource:
    """Open several sources in sequence; image files listed individually keep their paths as keys.

    Raises:
        UserError: see `open_source`.
    """
    names = [str(spec) for spec in specs]
    if all(kind_of(name) == "image" for name in names):
        paths = [existing("", local_path(name)) for name in names]
        files = [path for path in paths if path is not None and os.path.isfile(path)]
        if len(files) == len(paths):
            return FileSource(Path(), files)
    sources = [open_source(name) for name in names]
    return sources[0] if len(sources) == 1 else Concatenated(sources)


def _open_folder(folder: Path) -> ImageSource:
    if is_saved_dataset(folder):
        return DatasetSource(load_saved(folder), str(folder), [folder])
    listing = list_folder(folder, deep=("image",), flat=("tar", "parquet"))
    skip_side_files(listing)
    kinds = sorted(listing.files)
    if len(kinds) > 1:
        raise UserError(
            f"folder {str(folder)!r} contains several kinds of data ({listing.found()}); use one kind per folder, or "
            f"a pattern such as '{folder}/*.{'tar' if 'tar' in kinds else 'parquet'}'"
        )
    if kinds == ["tar"]:
        report_skipped(str(folder), listing.others)
        return TarSource([folder / name for name in listing.files["tar"]], str(folder))
    if kinds == ["parquet"]:
        report_skipped(str(folder), listing.others)
        return DatasetSource(
            load_parquet([folder / name for name in listing.files["parquet"]], str(folder)), str(folder), [folder]
        )
    return FileSource(folder)


def skip_side_files(listing: Listing) -> None:
    """Skip the metadata that img2dataset writes next to its shards: `00000.parquet` and `00000_stats.json`."""
    stems = {os.path.splitext(name)[0] for name in listing.files.get("tar", [])}
    for kind in ("parquet", "json"):
        names = listing.files.get(kind, [])
        if names and all(os.path.splitext(name)[0].removesuffix("_stats") in stems for name in names):
            listing.skip(kind)


# Parts -------------------------------------------------------------------------------------------------------


def evenly_spread(count: int, wanted: int) -> list[int]:
    """At most `wanted` of the numbers 0..count-1, evenly spread and including the first and the last."""
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).round().astype(int)).tolist()


def is_held_out(key: str, fraction: float) -> bool:
    """Whether an image belongs to the held-out part; depends only on its key."""
    digest = hashlib.sha256(key.encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") % _HASH_SPACE < fraction * _HASH_SPACE


def split_held_out(source: ImageSource, fraction: float) -> tuple[ImageSource, Subset]:
    """Split a source into the part to train on and the held-out part."""
    held = np.fromiter((fraction > 0 and is_held_out(source.key(i), fraction) for i in range(len(source))), bool)
    return Subset(source, np.flatnonzero(~held)), Subset(source, np.flatnonzero(held))
