"""Tar shards as sources of images: scanned once for the offsets of their members, then read in place."""

import contextlib
import hashlib
import json
import os
import tarfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from evotok_plugin.common.files import cache_folder, write_text
from evotok_plugin.common.foreign_files import describe_error, open_regular, readable_json
from evotok_plugin.data.bad_samples import shorten
from evotok_plugin.data.files import (
    described,
    distinct_names,
    file_state,
    is_hidden,
    kind_of,
    report_skipped,
    stamp_of,
    suffix_of,
)
from evotok_plugin.data.images import IMAGE_SUFFIXES, open_picture
from evotok_plugin.data.keys import PackedStrings
from evotok_plugin.errors import UserError

T = TypeVar("T")

_LONGEST_LABEL = 4096  # bytes
_OPEN_SHARDS = 64  # file descriptors that a process keeps open
_SCANNED_ALONE = 8  # shards up to which starting other processes is not worthwhile


class FilesInPlace:
    """Files that are read at any offset. Data-loading processes can share an instance, by fork or by pickle."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = [str(path) for path in paths]
        self._open: OrderedDict[int, int] = OrderedDict()
        self._owner = os.getpid()

    def read(self, file: int, offset: int, size: int) -> bytes:
        """Read `size` bytes of a file, given by its number.

        Raises:
            UserError: the file cannot be read.
        """
        try:
            descriptor = self._descriptor(file)
            there = max(0, os.fstat(descriptor).st_size - offset)  # a damaged size would be allocated
            return os.pread(descriptor, min(size, there), offset)
        except OSError as error:
            cause = describe_error(error, self._paths[file])
            raise UserError(f"{self._paths[file]!r} cannot be read: {cause}; copy it again") from error

    def _descriptor(self, file: int) -> int:
        """Descriptor of a file; the most recently used files stay open."""
        if self._owner != os.getpid():  # a forked process does not use the descriptors of its parent
            self._open, self._owner = OrderedDict(), os.getpid()
        if file not in self._open:
            if len(self._open) >= _OPEN_SHARDS:
                os.close(self._open.popitem(last=False)[1])
            with open_regular(self._paths[file]) as opened:
                self._open[file] = os.dup(opened.fileno())
        self._open.move_to_end(file)
        return self._open[file]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}


class TarSource(FilesInPlace):
    """The images of tar shards, in WebDataset's format or plain image files.

    Files of one sample share their name up to the first dot. The sample's image is the file whose full suffix is an
    image suffix (`x.jpg`, even if there is `x.seg.png`). Without such a file, or with several, all images of the sample
    count, under their longer names (`x.0001.jpg`, `x.0002.jpg`). The label is the content of the `.cls` file.

    Raises:
        UserError: a shard is missing, broken or compressed, or contains two images of the same name, or there are no
            images.
    """

    def __init__(self, shards: Sequence[Path], name: str) -> None:
        super().__init__(shards)
        self.name = name
        parts = scan_shards(shards, shard_index)
        self._shard = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part["keys"]) for part in parts])
        self._offsets, self._sizes = (
            np.fromiter((value for part in parts for value in part[name]), np.int64) for name in ("offsets", "sizes")
        )
        self._keys = PackedStrings(key for part in parts for key in part["keys"])
        labels = [label for part in parts for label in part["labels"]]
        self._labels = PackedStrings(label or "" for label in labels) if any(labels) else None
        self._shard_names = distinct_names(shards)
        self._states = [(os.path.abspath(shard), file_state(shard)) for shard in shards]
        skipped = sum((Counter(part["skipped"]) for part in parts), Counter())
        if not len(self._keys):
            raise UserError(f"{name!r} contains no images ({', '.join(IMAGE_SUFFIXES)}); found {described(skipped)}")
        report_skipped(name, skipped, "member")

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, index: int) -> str:
        return f"{self._shard_names[self._shard[index]]}/{self._keys[index]}"

    def picture(self, index: int) -> Image.Image:
        return open_picture(self.content(index), self.key(index))

    def content(self, index: int) -> bytes:
        return self.read(int(self._shard[index]), int(self._offsets[index]), int(self._sizes[index]))

    def stamp(self, index: int) -> bytes:
        path, state = self._states[self._shard[index]]
        return stamp_of(f"{path}/{self._keys[index]}", *state, int(self._offsets[index]), int(self._sizes[index]))

    def label(self, index: int) -> str | None:
        return (self._labels[index] or None) if self._labels is not None else None

    def groups(self) -> np.ndarray:
        return self._shard


def scan_shards(shards: Sequence[Path], scan: Callable[[str], T]) -> list[T]:
    """Apply `shard_index` or `shard_members` to tar shards, in several processes if there are many."""
    paths = [str(shard) for shard in shards]
    if len(paths) <= _SCANNED_ALONE:
        return [scan(path) for path in paths]
    with ProcessPoolExecutor(min(os.cpu_count() or 1, len(paths))) as pool:
        return list(pool.map(scan, paths))


def shard_index(shard: str) -> dict[str, Any]:
    """Index the images of a tar shard; the result is cached in the user's cache folder until the shard changes.

    Returns:
        `keys`, `labels`, `offsets` and `sizes` of the images, and `skipped`, the number of other files by suffix.

    Raises:
        UserError: the shard is missing, broken or compressed, or contains two images of the same name.
    """
    return _cached("2", shard, _scan_shard)


def shard_members(shard: str) -> dict[str, list]:
    """Index all files of a tar shard in order, cached as for `shard_index`.

    Returns:
        `names`, `offsets` and `sizes`; the offset is -1 for entries without content (links to other places, devices).
    """
    return _cached("members 2", shard, _scan_members)


def _cached(kind: str, shard: str, scan: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    state = file_state(shard)
    if not state:
        raise UserError(f"shard {shard!r} does not exist")
    identity = f"{kind} {os.path.realpath(shard)} {state}"
    file = cache_folder("shards") / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.json"
    index = readable_json(file)
    if index is not None and _is_index(index):
        return index
    index = scan(shard)  # it is missing, or damaged
    # If the index cannot be stored, the next run scans the shard again.
    with contextlib.suppress(OSError, UserError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(index), shared=True)
    return index


def _is_index(index: dict[str, Any]) -> bool:
    """Whether a cached index has lists of equal length, of the types that a scan gives."""
    names = "keys" if "keys" in index else "names"
    lists: list[Any] = [index.get(name) for name in (names, "offsets", "sizes", *["labels"] * (names == "keys"))]
    if not all(isinstance(values, list) and len(values) == len(index.get(names, ())) for values in lists):
        return False
    keys, offsets, sizes, *labels = lists
    skipped = index.get("skipped", {})
    return (
        all(isinstance(key, str) for key in keys)
        and all(type(number) is int and abs(number) < 2**62 for number in (*offsets, *sizes))
        and all(label is None or isinstance(label, str) for values in labels for label in values)
        and isinstance(skipped, dict)
        and all(type(count) is int for count in skipped.values())
    )


def split_member_name(name: str) -> tuple[str, str]:
    """Split a member's name into its sample and suffix: `a/x.0.jpg` is `0.jpg` of sample `a/x`."""
    folder, _, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return f"{folder}/{stem}" if folder else stem, suffix


def _members(shard: str) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of all files in a shard, except hidden ones."""
    places: dict[str, tuple[int, int]] = {}  # of possible targets of hard links
    try:
        with open_regular(shard) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # not in the stubs; otherwise all headers stay in memory
                if member.isdir() or is_hidden(member.name):
                    continue
                if member.isfile():
                    places[member.name] = (member.offset_data, member.size)
                target = member.linkname if member.islnk() else member.name
                yield (member.name, *places.get(target, (-1, 0)))
    except Exception as error:  # tarfile raises many types for damaged headers
        hint = "; compressed shards are not supported, decompress them to .tar" if _is_compressed(shard) else ""
        raise UserError(
            f"shard {shard!r} cannot be read as a tar file: {describe_error(error, shard)}{hint}"
        ) from error


def _scan_shard(shard: str) -> dict[str, Any]:
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    classes: dict[str, tuple[int, int]] = {}
    skipped: Counter = Counter()
    for name, offset, size in _members(shard):
        key, suffix = split_member_name(name)
        if offset < 0:
            skipped["link or device"] += 1
        elif kind_of(name) == "image":
            images = samples.setdefault(key, {})
            if name in images:
                raise UserError(
                    f"shard {shard!r} contains two files named {shorten(name)}; give every image a unique name"
                )
            images[name] = (offset, size)
        elif suffix == "cls":
            classes[key] = (offset, size)
        else:
            skipped[suffix_of(name)] += 1
    with open_regular(shard) as file:
        labels = {
            key: os.pread(file.fileno(), min(size, _LONGEST_LABEL), offset) for key, (offset, size) in classes.items()
        }
    index: dict[str, Any] = {"keys": [], "labels": [], "offsets": [], "sizes": [], "skipped": skipped}
    for sample, images in samples.items():
        chosen = _images_of_sample(sample, images)
        skipped.update(f".{split_member_name(name)[1]}" for name in images if name not in chosen.values())
        for key, name in chosen.items():
            index["keys"].append(key)
            index["labels"].append(labels[sample].decode(errors="replace").strip() if sample in labels else None)
            index["offsets"].append(images[name][0])
            index["sizes"].append(images[name][1])
    return index


def _images_of_sample(sample: str, images: Iterable[str]) -> dict[str, str]:
    """Members by key: the single image of a sample, or all images that share its name up to the first dot."""
    plain = [name for name in images if "." not in split_member_name(name)[1]]
    if len(plain) == 1:
        return {sample: plain[0]}
    bare = Counter(os.path.splitext(name)[0] for name in images)
    return {stem if bare[stem := os.path.splitext(name)[0]] == 1 else name: name for name in images}


def _scan_members(shard: str) -> dict[str, list]:
    found = list(_members(shard))
    return {name: [member[place] for member in found] for place, name in enumerate(("names", "offsets", "sizes"))}


def _is_compressed(path: str) -> bool:
    try:
        with open_regular(path) as file:
            head = file.read(4)
    except OSError:
        return False
    return head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zX", b"\x28\xb5\x2f\xfd"))
