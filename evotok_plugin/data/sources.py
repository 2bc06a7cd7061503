"""Where images come from: folders, lists of files, tar shards (WebDataset), parquet and Hugging Face data sets.

A source gives images by number, so that whatever reads it can start anywhere: training resumes at a position, several
processes take disjoint parts, a half-written code cache is completed. A tar shard is scanned once for where its members
lie; images are then read in place, nothing is unpacked.
"""

import glob
import hashlib
import json
import os
import re
import tarfile
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from PIL import Image

from evotok_plugin.data.images import IMAGE_SUFFIXES, open_picture

T = TypeVar("T")

_HASH_SPACE = 10_000
_OPEN_SHARDS = 64


class ImageSource(Protocol):
    """Images 0..len-1. `keys` are unique within a source and stay the same from run to run."""

    name: str

    def __len__(self) -> int: ...

    def key(self, index: int) -> str:
        """The image's name."""

    def picture(self, index: int) -> Image.Image:
        """The image as RGB; ValueError if it is missing or broken."""

    def label(self, index: int) -> str | None:
        """Its class, where the source knows classes."""

    def groups(self) -> np.ndarray | None:
        """For every image the number of the shard that holds it (len,), or None where reading anywhere costs the
        same."""


class PackedStrings(Sequence):
    """Many strings in two arrays: small, and shared by data-loading processes without copies."""

    def __init__(self, strings: Iterable[str]) -> None:
        ends, content = array("q"), bytearray()
        for text in strings:
            content += os.fsencode(text)
            ends.append(len(content))
        self._ends, self._bytes = np.array(ends, np.int64), np.frombuffer(bytes(content), np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self._ends):
            raise IndexError(f"index {index} of {len(self._ends)} strings")
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(self._bytes[start : self._ends[index]].tobytes())


class FileSource:
    """Image files: all below a folder (keys are paths relative to it, labels the names of the folders they lie in, as
    in ImageNet's layout), or those that are listed.

    Raises:
        ValueError: no images there.
    """

    def __init__(self, root: Path, names: Iterable[str] | None = None) -> None:
        self.name, self._root = str(root), root
        self._names = PackedStrings(sorted(_image_files(root)) if names is None else names)
        if not len(self._names):
            raise ValueError(f"{str(root)!r} holds no images ({', '.join(IMAGE_SUFFIXES)})")

    def __len__(self) -> int:
        return len(self._names)

    def key(self, index: int) -> str:
        return self._names[index]

    def picture(self, index: int) -> Image.Image:
        return open_picture(self._root / self._names[index])

    def label(self, index: int) -> str | None:
        return Path(self._names[index]).parent.name or None

    def groups(self) -> None:
        return None


def _image_files(root: Path) -> Iterable[str]:
    """Paths of the images below a folder, relative to it; links are followed, each folder is entered once."""
    entered = set()
    for folder, inner, files in os.walk(root, followlinks=True):
        inner[:] = [
            name
            for name in inner
            if (real := os.path.realpath(os.path.join(folder, name))) not in entered and not entered.add(real)
        ]
        below = Path(folder).relative_to(root)
        yield from ((below / name).as_posix() for name in files if name.lower().endswith(IMAGE_SUFFIXES))


class FilesInPlace:
    """Files of which parts are read where they lie. Data-loading processes may share one, by fork or by pickle."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = [str(path) for path in paths]
        self._open: OrderedDict[int, int] = OrderedDict()
        self._owner = os.getpid()

    def read(self, file: int, offset: int, size: int) -> bytes:
        """`size` bytes of a file, which is named by its number.

        Raises:
            ValueError: they cannot be read.
        """
        try:
            return os.pread(self._descriptor(file), size, offset)
        except OSError as error:
            raise ValueError(f"{self._paths[file]!r} cannot be read: {error}") from error

    def _descriptor(self, file: int) -> int:
        """The open file; of many the ones used last stay open."""
        if self._owner != os.getpid():  # a data-loading process: the parent's files stay the parent's
            self._open, self._owner = OrderedDict(), os.getpid()
        if file not in self._open:
            if len(self._open) >= _OPEN_SHARDS:
                os.close(self._open.popitem(last=False)[1])
            self._open[file] = os.open(self._paths[file], os.O_RDONLY)
        self._open.move_to_end(file)
        return self._open[file]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}


class TarSource(FilesInPlace):
    """The images of WebDataset tar shards. Files of one sample share their name up to the first dot; its image is the
    first file with an image's suffix, its label what `.cls` holds.

    Raises:
        ValueError: a shard is missing, broken or compressed, or holds no images.
    """

    def __init__(self, shards: Sequence[Path], name: str) -> None:
        super().__init__(shards)
        self.name = name
        parts = scan_shards(shards, shard_index)
        self._shard = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part["keys"]) for part in parts])
        self._offsets, self._sizes = (
            np.fromiter((value for part in parts for value in part[what]), np.int64) for what in ("offsets", "sizes")
        )
        self._keys = PackedStrings(key for part in parts for key in part["keys"])
        labels = [label for part in parts for label in part["labels"]]
        self._labels = PackedStrings(label or "" for label in labels) if any(labels) else None
        if not len(self._keys):
            raise ValueError(f"{name!r} holds no images ({', '.join(IMAGE_SUFFIXES)})")

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, index: int) -> str:
        return f"{Path(self._paths[self._shard[index]]).stem}/{self._keys[index]}"

    def picture(self, index: int) -> Image.Image:
        content = self.read(int(self._shard[index]), int(self._offsets[index]), int(self._sizes[index]))
        return open_picture(content, self.key(index))

    def label(self, index: int) -> str | None:
        return (self._labels[index] or None) if self._labels is not None else None

    def groups(self) -> np.ndarray:
        return self._shard


class _InPlace:
    """As many workers as there is work for: none."""

    map = staticmethod(map)

    def __enter__(self) -> "_InPlace":
        return self

    def __exit__(self, *error: object) -> None:
        return None


def scan_shards(shards: Sequence[Path], index: Callable[[str], T]) -> list[T]:
    """`shard_index` or `shard_members` of tar shards; of many, in several processes."""
    with ProcessPoolExecutor(min(os.cpu_count() or 1, len(shards))) if len(shards) > 8 else _InPlace() as pool:
        return list(pool.map(index, map(str, shards)))


def _index_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "evotok" / "shards"


def shard_index(shard: str) -> dict[str, list]:
    """`keys`, `labels`, `offsets` and `sizes` of the images in a tar shard; kept in the user's cache folder until the
    shard changes.

    Raises:
        ValueError: the shard is missing, broken or compressed.
    """
    return _kept("1", shard, _scan_shard)


def shard_members(shard: str) -> dict[str, list]:
    """`names`, `offsets` and `sizes` of all files in a tar shard, in their order; kept, and refused, likewise."""
    return _kept("members 1", shard, _scan_members)


def _kept(what: str, shard: str, scan: Callable[[str], dict[str, list]]) -> dict[str, list]:
    try:
        facts = os.stat(shard)
    except OSError:
        raise ValueError(f"shard {shard!r} does not exist") from None
    identity = f"{what} {os.path.realpath(shard)} {facts.st_size} {facts.st_mtime_ns}"
    kept = _index_folder() / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.json"
    try:
        return json.loads(kept.read_text())
    except (OSError, ValueError):
        index = scan(shard)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        temporary = kept.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(index))
        os.replace(temporary, kept)
    except OSError:
        pass  # no place to keep it: it will be made again
    return index


def split_member_name(name: str) -> tuple[str, str]:
    """The sample that a file of a shard belongs to, and the file's suffix: `a/x.0.jpg` is `0.jpg` of sample `a/x`."""
    folder, _, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return f"{folder}/{stem}" if folder else stem, suffix


def _members(shard: str) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of all files in a shard."""
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                archive.members = []  # else every header stays in memory
                if member.isfile():
                    yield member.name, member.offset_data, member.size
    except (tarfile.TarError, OSError, EOFError) as error:
        hint = "; compressed shards cannot be read in place, unpack them to .tar" if _is_compressed(shard) else ""
        raise ValueError(f"shard {shard!r} cannot be read as a tar file: {error}{hint}") from error


def _scan_shard(shard: str) -> dict[str, list]:
    images: dict[str, tuple[int, int]] = {}
    classes: dict[str, tuple[int, int]] = {}
    for name, offset, size in _members(shard):
        key, suffix = split_member_name(name)
        if f".{suffix}".lower().endswith(IMAGE_SUFFIXES):
            images.setdefault(key, (offset, size))
        elif suffix == "cls":
            classes[key] = (offset, size)
    with open(shard, "rb") as file:
        labels = {key: os.pread(file.fileno(), size, offset) for key, (offset, size) in classes.items()}
    return {
        "keys": list(images),
        "labels": [labels[key].decode(errors="replace").strip() if key in labels else None for key in images],
        "offsets": [place[0] for place in images.values()],
        "sizes": [place[1] for place in images.values()],
    }


def _scan_members(shard: str) -> dict[str, list]:
    found = list(_members(shard))
    return {what: [one[place] for one in found] for place, what in enumerate(("names", "offsets", "sizes"))}


def _is_compressed(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(4).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zX", b"\x28\xb5\x2f\xfd"))


class DatasetSource:
    """A split of a Hugging Face data set with an image column; labels are its `label` column.

    Raises:
        ValueError: the data set has no column of images.
    """

    def __init__(self, dataset: Any, name: str) -> None:
        import datasets

        self.name = name
        column = next(
            (c for c, kind in dataset.features.items() if isinstance(kind, datasets.Image)),
            next((c for c in ("image", "jpg", "png", "webp") if c in dataset.features), None),
        )
        if column is None:
            raise ValueError(f"{name!r} has no column of images; its columns are {', '.join(dataset.features)}")
        if isinstance(dataset.features[column], datasets.Image):
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
        self._images = dataset.select_columns([column])
        self._column = column
        self._labels = dataset["label"] if "label" in dataset.features else None
        self._names = getattr(dataset.features.get("label"), "names", None)

    def __len__(self) -> int:
        return len(self._images)

    def key(self, index: int) -> str:
        return f"{index:09d}"

    def picture(self, index: int) -> Image.Image:
        content = self._images[int(index)][self._column]
        if isinstance(content, dict):
            content = content["bytes"] or content["path"]
        if not isinstance(content, (bytes, str)):
            raise ValueError(f"image {self.key(index)!r} of {self.name!r} is missing: a {type(content).__name__}")
        return open_picture(content, f"{self.name} row {index}")

    def label(self, index: int) -> str | None:
        if self._labels is None:
            return None
        value = self._labels[int(index)]
        return self._names[value] if self._names and isinstance(value, int) and value >= 0 else str(value)

    def groups(self) -> None:
        return None


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
        ValueError: nothing there, or nothing that can be understood.
    """
    spec = str(spec)
    if spec.startswith("hf:"):
        return _open_hub(spec)
    if "://" in spec or spec.startswith("pipe:"):
        raise ValueError(
            f"source {spec!r}: only local files are read; download or mount it, or name a hub data set hf:..."
        )
    path = Path(spec)
    if path.is_dir():
        return _open_folder(path)
    if path.is_file() and path.suffix not in (".tar", ".parquet"):
        return FileSource(path.parent, [path.name])
    files = matching_files(spec)
    kinds = {file.suffix for file in files}
    if not files:
        raise ValueError(f"source {spec!r} does not exist; expected images, a folder, .tar shards, .parquet or hf:NAME")
    if kinds == {".tar"}:
        return TarSource(files, spec)
    if kinds == {".parquet"}:
        return _open_parquet(files, spec)
    if kinds <= set(IMAGE_SUFFIXES):
        return Concatenated([FileSource(file.parent, [file.name]) for file in files])
    raise ValueError(f"source {spec!r}: expected images, .tar or .parquet files, found {', '.join(sorted(kinds))}")


def open_sources(specs: Sequence[str | Path]) -> ImageSource:
    """All of them, one after another; image files that are named one by one keep their names as keys.

    Raises:
        ValueError: as `open_source` says.
    """
    if all(Path(spec).is_file() and Path(spec).suffix.lower() in IMAGE_SUFFIXES for spec in map(str, specs)):
        return FileSource(Path(), [str(spec) for spec in specs])
    sources = [open_source(spec) for spec in specs]
    return sources[0] if len(sources) == 1 else Concatenated(sources)


def matching_files(pattern: str) -> list[Path]:
    """The files that a path or pattern means, with `*`, `?`, `[..]` and `{000..127}`; none if there are none."""
    return sorted(Path(found) for one in _braces(pattern) for found in glob.glob(one))


def _braces(pattern: str) -> list[str]:
    """`a{000..002}.tar` -> a000.tar, a001.tar, a002.tar."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        return [pattern]
    first, last, width = int(match[1]), int(match[2]), len(match[1])
    numbers = (f"{number:0{width}d}" for number in range(first, last + 1))
    return [full for number in numbers for full in _braces(pattern[: match.start()] + number + pattern[match.end() :])]


def _open_folder(folder: Path) -> ImageSource:
    if is_saved_dataset(folder):
        return DatasetSource(load_saved(folder), str(folder))
    if shards := sorted(folder.glob("*.tar")):
        return TarSource(shards, str(folder))
    if files := sorted(folder.glob("*.parquet")):
        return _open_parquet(files, str(folder))
    return FileSource(folder)


def _open_parquet(files: Sequence[Path], name: str) -> DatasetSource:
    return DatasetSource(load_parquet(files, name), name)


def _open_hub(spec: str) -> DatasetSource:
    return DatasetSource(load_hub(spec), spec)


def is_saved_dataset(folder: Path) -> bool:
    """Whether `datasets`' `save_to_disk` wrote the folder."""
    return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()


def load_saved(folder: Path) -> Any:
    """The `datasets.Dataset` that `save_to_disk` wrote.

    Raises:
        ValueError: it is broken.
    """
    import datasets

    try:
        return datasets.load_from_disk(str(folder))
    except Exception as error:  # whatever pyarrow says of a broken file
        raise ValueError(f"{str(folder)!r} cannot be loaded as a saved data set: {error}") from error


def load_parquet(files: Sequence[Path], name: str) -> Any:
    """Parquet files as one `datasets.Dataset`, memory-mapped.

    Raises:
        ValueError: one of them is broken.
    """
    import datasets

    try:
        return datasets.load_dataset("parquet", data_files=[str(file) for file in files], split="train")
    except Exception as error:  # whatever pyarrow says of a broken file
        raise ValueError(f"{name!r} cannot be read as parquet: {error}") from error


def load_hub(spec: str) -> Any:
    """The `datasets.Dataset` that `hf:NAME`, `hf:NAME:SPLIT` or `hf:NAME:CONFIGURATION:SPLIT` means.

    Raises:
        ValueError: it cannot be had.
    """
    import datasets

    _, name, *rest = spec.split(":")
    split, configuration = (rest[-1] if rest else "train"), (rest[0] if len(rest) > 1 else None)
    try:
        return datasets.load_dataset(name, configuration, split=split)
    except Exception as error:  # no network, no such data set, no such split
        raise ValueError(f"data set {spec!r} cannot be loaded: {error}") from error


# Parts -------------------------------------------------------------------------------------------------------


def is_held_out(key: str, fraction: float) -> bool:
    """Whether an image belongs to the held-out part: decided by its key alone."""
    digest = hashlib.sha256(key.encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") % _HASH_SPACE < fraction * _HASH_SPACE


def split_held_out(source: ImageSource, fraction: float) -> tuple[ImageSource, Subset]:
    """The part to train on and the held-out part."""
    held = np.fromiter((fraction > 0 and is_held_out(source.key(i), fraction) for i in range(len(source))), bool)
    return Subset(source, np.flatnonzero(~held)), Subset(source, np.flatnonzero(held))
