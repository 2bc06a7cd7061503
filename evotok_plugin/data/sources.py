"""Where images come from: folders, lists of files, tar shards (WebDataset), parquet and Hugging Face data sets.

A source gives images by number, so that whatever reads it can start anywhere: training resumes at a position, several
processes take disjoint parts, a half-written code cache is completed. A tar shard is scanned once for where its members
lie; images are then read in place, nothing is unpacked.
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
    """Images 0..len-1. Keys are unique within a source and stay the same from run to run.

    `stamp` and `content` identify images for caches. A source of pictures that are not files may lack both; its keys
    then identify them.
    """

    name: str

    def __len__(self) -> int: ...

    def key(self, index: int) -> str:
        """The image's name."""

    def picture(self, index: int) -> Image.Image:
        """The image as RGB; ValueError if it is missing or broken."""

    def stamp(self, index: int) -> bytes:
        """16 bytes (`stamp_of`) that tell where the image lies and change when it may have changed; nothing is read."""

    def content(self, index: int) -> bytes:
        """The image's file; ValueError if it cannot be read."""

    def label(self, index: int) -> str | None:
        """Its class, where the source knows classes."""

    def groups(self) -> np.ndarray | None:
        """For every image the number of the shard that holds it (len,), or None where reading anywhere costs the
        same."""


class FileSource:
    """Image files: all below a folder (keys are paths relative to it, labels the names of the folders they lie in, as
    in ImageNet's layout), or those that are listed.

    Raises:
        UserError: no images there.
    """

    def __init__(self, root: Path, names: Iterable[str] | None = None) -> None:
        self.name, self._root = str(root), root
        self._names = PackedStrings(_images_below(root) if names is None else names)
        if not len(self._names):
            raise UserError(f"{str(root)!r}: no image files are named")

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
    """The images of a folder and its sub-folders; what else is there is reported."""
    listing = list_folder(root, deep=("image",))
    if not listing.files:
        raise UserError(
            f"{str(root)!r} holds no images ({', '.join(IMAGE_SUFFIXES)}); found {described(listing.others)}"
        )
    report_skipped(str(root), listing.others)
    return listing.files["image"]


class Subset:
    """Some images of a source."""

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
    """Several sources one after another; where there is more than one, keys begin with the source's name."""

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
    """The source that a word on the command line means.

    Args:
        spec: an image file; a folder of images; a `.tar` shard, a pattern of shards (`shards/{000..127}.tar`,
            `shards/*.tar`) or a folder of them; likewise with `.parquet`; a folder written by `datasets`'
            `save_to_disk`; `hf:NAME`, `hf:NAME:SPLIT` or `hf:NAME:CONFIGURATION:SPLIT`, a data set of the hub (split
            `train` if none is named).

    Raises:
        UserError: nothing there, or nothing that can be understood.
    """
    spec = str(spec)
    if spec.startswith("hf:"):
        return DatasetSource(load_hub(spec), spec)
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
        return DatasetSource(load_parquet(files, spec), spec)
    if len(files) == 1 and kinds != {"json"}:  # an image, whatever its suffix
        return FileSource(files[0].parent, [files[0].name])
    if kinds == {"image"}:
        return FileSource(Path(), map(str, files))
    found = described(Counter("folder" if file.is_dir() else suffix_of(file) for file in files))
    raise UserError(f"source {spec!r}: expected images, or .tar, or .parquet files, or one folder; found {found}")


def open_sources(specs: Sequence[str | Path]) -> ImageSource:
    """All of them, one after another; image files that are named one by one keep their names as keys.

    Raises:
        UserError: as `open_source` says.
    """
    names = [str(spec) for spec in specs]
    if all(kind_of(name) == "image" for name in names):
        paths = [existing("", local_path(name)) for name in names]
        if all(path is not None and os.path.isfile(path) for path in paths):
            return FileSource(Path(), paths)
    sources = [open_source(name) for name in names]
    return sources[0] if len(sources) == 1 else Concatenated(sources)


def _open_folder(folder: Path) -> ImageSource:
    if is_saved_dataset(folder):
        return DatasetSource(load_saved(folder), str(folder))
    listing = list_folder(folder, deep=("image",), flat=("tar", "parquet"))
    skip_side_files(listing)
    kinds = sorted(listing.files)
    if len(kinds) > 1:
        raise UserError(
            f"folder {str(folder)!r} holds several kinds of data ({listing.found()}); keep one kind in a folder, or "
            f"name the files by a pattern such as '{folder}/*.{'tar' if 'tar' in kinds else 'parquet'}'"
        )
    if kinds == ["tar"]:
        report_skipped(str(folder), listing.others)
        return TarSource([folder / name for name in listing.files["tar"]], str(folder))
    if kinds == ["parquet"]:
        report_skipped(str(folder), listing.others)
        return DatasetSource(
            load_parquet([folder / name for name in listing.files["parquet"]], str(folder)), str(folder)
        )
    return FileSource(folder)


def skip_side_files(listing: Listing) -> None:
    """Leave out the notes that img2dataset writes beside its shards: `00000.parquet` and `00000_stats.json`."""
    stems = {os.path.splitext(name)[0] for name in listing.files.get("tar", [])}
    for kind in ("parquet", "json"):
        names = listing.files.get(kind, [])
        if names and all(os.path.splitext(name)[0].removesuffix("_stats") in stems for name in names):
            listing.skip(kind)


# Parts -------------------------------------------------------------------------------------------------------


def is_held_out(key: str, fraction: float) -> bool:
    """Whether an image belongs to the held-out part: decided by its key alone."""
    digest = hashlib.sha256(key.encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") % _HASH_SPACE < fraction * _HASH_SPACE


def split_held_out(source: ImageSource, fraction: float) -> tuple[ImageSource, Subset]:
    """The part to train on and the held-out part."""
    held = np.fromiter((fraction > 0 and is_held_out(source.key(i), fraction) for i in range(len(source))), bool)
    return Subset(source, np.flatnonzero(~held)), Subset(source, np.flatnonzero(held))
