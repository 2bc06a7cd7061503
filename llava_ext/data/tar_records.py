"""Records of WebDataset tar shards, read in place."""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from evotok_plugin.data.files import described, file_state, kind_of, report_skipped, stamp_of, suffix_of
from evotok_plugin.data.images import open_picture
from evotok_plugin.data.keys import PackedStrings
from evotok_plugin.data.tar_shards import FilesInPlace, scan_shards, shard_members, split_member_name
from evotok_plugin.errors import UserError
from llava_ext.data.records import Record, RowOptions, named_image, parse_row

_TEXTS = ("json", "txt")
_UNSUPPORTED = ("mp4", "avi", "mov", "mkv", "webm", "mp3", "wav", "flac", "ogg", "m4a")


class TarRecords:
    """Records of WebDataset tar shards, read in place.

    A row is a sample. Its `.json` has the fields of a row in a JSON file, or its `.txt` is a caption; its images
    (`.jpg`, or `.0.jpg`, `.1.png`, ...) are the images of the row, ordered by number. A sample without images can refer
    to files of the image folder.

    Raises:
        UserError: a shard is missing, damaged or compressed.
    """

    def __init__(self, shards: Sequence[Path], name: str, options: RowOptions) -> None:
        self.name, self._options, self._files = name, options, FilesInPlace(shards)
        members = scan_shards(shards, shard_members)
        parts = [_samples_of(*shard) for shard in zip(shards, members, strict=True)]
        self._states = [file_state(shard) for shard in shards]
        self._shard_names = [str(file) for file in shards]
        self._shard_keys = [f"{file.stem}-{part.digest}" for file, part in zip(shards, parts, strict=True)]
        self._shard = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part.keys) for part in parts])
        self._keys = PackedStrings(key for part in parts for key in part.keys)
        self._member_starts = np.cumsum([0, *(count for part in parts for count in part.num_members)])
        self._suffixes = PackedStrings(suffix for part in parts for suffix in part.suffixes)
        self._places = np.concatenate([part.places for part in parts])  # (members, 2): offset and size
        skipped = sum((part.skipped for part in parts), Counter())
        if not len(self._keys):
            raise UserError(
                f"data {name}: no samples (.json or .txt, and images) in {len(shards)} shards; "
                f"found {described(skipped)}"
            )
        report_skipped(name, skipped, "member")

    def __len__(self) -> int:
        return len(self._keys)

    def row_name(self, index: int) -> str:
        return f"{self._shard_names[self._shard[index]]}:{self._keys[index]}"

    def records(self, index: int) -> tuple[Record, ...]:
        members = self._members(index)
        repeated = {suffix for suffix, count in Counter(suffix for suffix, _ in members).items() if count > 1}
        if repeated:
            raise UserError(f"the sample occurs twice in the shard ({', '.join(sorted(repeated))})")
        if unsupported := [suffix for suffix, _ in members if _last(suffix) in _UNSUPPORTED]:
            raise UserError(f"the sample has a .{unsupported[0]} file; only text and images are supported")
        row = self._row(index, dict(members))
        shard = self._shard[index]
        images = [
            (f"{self._shard_keys[shard]}/{self._keys[index]}.{suffix}", self._places[member].tolist())
            for suffix, member in _images_first_to_last(members)
        ]
        stamps = [stamp_of(key, self._states[shard], place) for key, place in images]
        return parse_row(row, self._options, [key for key, _ in images], stamps)

    def content(self, index: int, number: int) -> bytes:
        members = self._members(index)
        images = _images_first_to_last(members)
        if not images:
            return named_image(self._row(index, dict(members)), self._options, number).content()
        return self._read(index, images[number][1])

    def picture(self, index: int, number: int) -> Image.Image:
        images = _images_first_to_last(self._members(index))
        name = f"{self.row_name(index)}.{images[number][0]}" if images else f"{self.row_name(index)}, image {number}"
        return open_picture(self.content(index, number), name)

    def _members(self, index: int) -> list[tuple[str, int]]:
        """Suffix and member number of each file of a sample."""
        first, end = self._member_starts[index : index + 2].tolist()
        return [(self._suffixes[member], member) for member in range(first, end)]

    def _read(self, index: int, member: int) -> bytes:
        offset, size = self._places[member].tolist()
        return self._files.read(int(self._shard[index]), offset, size)

    def _row(self, index: int, members: dict[str, int]) -> object:
        content = {suffix: self._read(index, members[suffix]) for suffix in _TEXTS if suffix in members}
        try:
            row = json.loads(content["json"]) if "json" in content else {}
            if "txt" in content and isinstance(row, dict):  # the .json may hold only metadata of the image
                row = {"caption": content["txt"].decode(), **row}
        except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
            raise UserError(f"not valid JSON or text: {error}") from error
        return row


@dataclass(frozen=True)
class _Samples:
    """The samples of one shard.

    Attributes:
        keys: of the samples.
        num_members: of each sample.
        suffixes: of all members, sample after sample.
        places: offsets and sizes of these members, (members, 2).
        digest: distinguishes shards of the same name.
        skipped: number of members that do not belong to a sample, by suffix.
    """

    keys: list[str]
    num_members: list[int]
    suffixes: list[str]
    places: np.ndarray
    digest: str
    skipped: Counter


def _samples_of(shard: Path, members: dict[str, list]) -> _Samples:
    names = members["names"]
    keys = _sample_keys(names)
    samples: dict[str, list[int]] = {}
    skipped: Counter = Counter()
    for number, (name, key) in enumerate(zip(names, keys, strict=True)):
        if members["offsets"][number] < 0:
            skipped["link or device"] += 1
        elif key and (_suffix_in(name, key) in _TEXTS or kind_of(name) == "image" or _last(name) in _UNSUPPORTED):
            samples.setdefault(key, []).append(number)
        else:
            skipped[suffix_of(name)] += 1
    order = [number for numbers in samples.values() for number in numbers]
    places = np.array([members["offsets"], members["sizes"]], np.int64).reshape(2, -1).T
    return _Samples(
        keys=list(samples),
        num_members=[len(numbers) for numbers in samples.values()],
        suffixes=[_suffix_in(names[number], keys[number]) for number in order],
        places=places[order],
        digest=hashlib.sha256(json.dumps(members).encode() + _both_ends(shard)).hexdigest()[:12],
        skipped=skipped,
    )


def _last(name: str) -> str:
    """The part after the last dot, in lower case."""
    return name.rpartition(".")[2].lower()


def _suffix_in(name: str, key: str) -> str:
    """The part of a member's name after the key of its sample; `json` and `txt` in lower case."""
    suffix = name[len(key) + 1 :]
    return suffix.lower() if suffix.lower() in _TEXTS else suffix


def _sample_keys(names: Sequence[str]) -> list[str]:
    """The sample key of each member: its name up to the first dot of the base name.

    Keys can contain dots: `photo.v2` is a separate sample if `photo.v2.json` has an image (`photo.v2.jpg`,
    `photo.v2.0.jpg`) or `photo.json` does not exist.
    """
    stems = [os.path.splitext(name)[0] for name in names]
    texts = {stem for name, stem in zip(names, stems, strict=True) if _last(name) in _TEXTS}
    images = {stem for name, stem in zip(names, stems, strict=True) if kind_of(name) == "image"}
    images |= {stem.rpartition(".")[0] for stem in images if _last(stem).isdigit()}
    keys = []
    for name, stem in zip(names, stems, strict=True):
        key = first = split_member_name(name)[0]
        while len(stem) > len(first):
            if stem in texts and (stem in images or first not in texts):
                key = stem
                break
            stem = os.path.splitext(stem)[0]
        keys.append("" if first.endswith("/") else key)
    return keys


def _both_ends(file: Path, size: int = 65_536) -> bytes:
    """The first and the last bytes of a file."""
    with file.open("rb") as content:
        first = content.read(size)
        content.seek(max(0, file.stat().st_size - size))
        return first + content.read(size)


def _images_first_to_last(members: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    """The members that are images, in natural order of their suffixes: `0.jpg`, `1.png`, ..., `10.jpg`."""
    images = [member for member in members if kind_of(f"x.{member[0]}") == "image"]
    by_number = [(re.split(r"(\d+)", suffix), suffix, member) for suffix, member in images]
    natural = sorted(by_number, key=lambda one: [int(t) if t.isdecimal() else t for t in one[0]])
    return [(suffix, member) for _, suffix, member in natural]
