"""One look at every record before training: what is usable, how long it is, which images it needs.

The look is divided among the processes of a run and, in each, among data-loading processes. What it leaves in memory
is some bytes a record, and each image's key once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image
from torch import Generator
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from evotok_plugin.common.processes import Processes
from evotok_plugin.common.progress import progress_interval
from evotok_plugin.data.keys import PackedStrings, key_digests
from llava_ext.data.record_sources import RecordSource
from llava_ext.data.records import KINDS, Record
from llava_ext.processing_evotok_llava import EvoTokLlavaProcessor, TooLong

_CHUNK = 256  # rows that are looked at in one piece


class RecordTable(Sequence[Record]):
    """Records of several sources by number, read when they are asked for.

    Attributes:
        kinds: of each record (len,) its number in `KINDS`, uint8.
        reads: of each (len,) whether it reads an image; one that draws may do so too.
        lengths: of each (len,) its LLM steps once it is cut, int32.
        sizes: how many records each source has; they stand source after source.
    """

    def __init__(
        self,
        sources: Sequence[RecordSource],
        places: np.ndarray,
        kinds: np.ndarray,
        reads: np.ndarray,
        lengths: np.ndarray,
    ) -> None:
        """`places` (len, 3) says of each record its source, the row in it, and which of the row's records it is."""
        self._sources, self._places = list(sources), places
        self.kinds, self.reads, self.lengths = kinds, reads, lengths
        self.sizes = np.bincount(places[:, 0], minlength=len(sources)).tolist()

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Record:
        source, row, number = self._places[index].tolist()
        return self._sources[source].records(row)[number]

    def name(self, index: int) -> str:
        """What reports call a record."""
        source, row, number = self._places[index].tolist()
        return _name(self._sources[source], row, number)

    def image_content(self, index: int) -> bytes:
        """The file of a record's first image.

        Raises:
            UserError: it cannot be read.
        """
        source, row, _ = self._places[index].tolist()
        return self._sources[source].content(row, 0)

    def without(self, left_out: np.ndarray) -> "RecordTable":
        """The others of them; `left_out` (len,) is a mask."""
        kept = (values[~left_out] for values in (self._places, self.kinds, self.reads, self.lengths))
        return RecordTable(self._sources, *kept)


def _name(source: RecordSource, row: int, number: int) -> str:
    return f"{source.row_name(row)}, record {number}" if number else source.row_name(row)


class RecordImages:
    """The images of all records, each once, as an `ImageSource`."""

    def __init__(
        self, sources: Sequence[RecordSource], places: np.ndarray, keys: PackedStrings, stamps: np.ndarray
    ) -> None:
        """`places` (len, 3) says of each image its source, the row in it, and which of the row's images it is;
        `stamps` (len,) tell its state."""
        self.name = ", ".join(source.name for source in sources)
        self._sources, self._places, self._keys, self._stamps = list(sources), places, keys, stamps

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, index: int) -> str:
        return self._keys[index]

    def picture(self, index: int) -> Image.Image:
        source, row, number = self._places[index].tolist()
        return self._sources[source].picture(row, number)

    def stamp(self, index: int) -> bytes:
        return bytes(self._stamps[index])

    def content(self, index: int) -> bytes:
        source, row, number = self._places[index].tolist()
        return self._sources[source].content(row, number)

    def label(self, index: int) -> None:
        return None

    def groups(self) -> None:
        return None


@dataclass
class RecordScan:
    """What was found.

    Attributes:
        records: those that are usable.
        images: all that they need.
        bad, too_long: why others are not usable, by their names.
        num_cut: how many of the usable ones lose their ends.
    """

    records: RecordTable
    images: RecordImages
    bad: dict[str, str]
    too_long: dict[str, str]
    num_cut: int
    _record_of: np.ndarray  # for each use of an image the record that uses it
    _image_of: np.ndarray  # and the image

    @property
    def num_records(self) -> int:
        """All, usable or not."""
        return len(self.records) + len(self.bad) + len(self.too_long)

    def needing(self, broken: dict[str, str]) -> dict[int, str]:
        """Which records need a broken image, and why it is broken, given by the images' keys."""
        is_broken = np.isin(key_digests(map(self.images.key, range(len(self.images)))), key_digests(broken))
        uses = np.flatnonzero(is_broken[self._image_of])
        keys = (self.images.key(int(self._image_of[use])) for use in uses)
        return {
            int(self._record_of[use]): broken[key] if key in broken[key] else f"image {key!r}: {broken[key]}"
            for use, key in zip(uses, keys, strict=True)
        }


def scan_records(
    sources: Sequence[RecordSource],
    processor: EvoTokLlavaProcessor,
    max_length: int,
    processes: Processes,
    num_workers: int = 2,
    show_progress: bool = False,
) -> RecordScan:
    """Look at every record of several sources; all processes take part, and all get the result.

    Args:
        max_length: LLM steps a record may have. A longer one is cut; it is left out where this would cut an image or
            leave nothing to learn.
        num_workers: data-loading processes of each process, at least 1.
    """
    chunks = _Chunks(sources, processor, max_length)
    mine = range(processes.rank, len(chunks), processes.world_size)
    loader = DataLoader(
        chunks,
        batch_size=None,
        sampler=mine,
        collate_fn=_as_it_is,
        num_workers=max(1, min(num_workers, len(mine))),
        generator=Generator(),  # else it would draw from the random numbers of whoever trains next
    )
    hidden = not (show_progress and processes.is_first)
    bar = tqdm(loader, desc="checking records", unit="chunk", disable=hidden, mininterval=progress_interval())
    parts = processes.gather(list(bar))
    return _join(sources, [parts[n % len(parts)][n // len(parts)] for n in range(len(chunks))])


def _as_it_is(facts: "_Facts") -> "_Facts":
    return facts


# What is found in a chunk ------------------------------------------------------------------------------------


@dataclass
class _Notes:
    """Lists over the usable records of a chunk; `images` over the images of these."""

    places: list[tuple[int, int, int]] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    reads: list[bool] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    num_images: list[int] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    stamps: list[bytes] = field(default_factory=list)
    bad: dict[str, str] = field(default_factory=dict)
    too_long: dict[str, str] = field(default_factory=dict)
    num_cut: int = 0


class _Facts:
    """The same in arrays, as they go from process to process."""

    def __init__(self, notes: _Notes) -> None:
        self.places = np.array(notes.places, np.int64).reshape(-1, 3)
        self.kinds, self.lengths = np.array(notes.kinds, np.uint8), np.array(notes.lengths, np.int32)
        self.reads = np.array(notes.reads, bool)
        self.num_images, self.images = np.array(notes.num_images, np.int32), PackedStrings(notes.images)
        self.digests, self.stamps = key_digests(notes.images), np.array(notes.stamps, "S16")
        self.bad, self.too_long, self.num_cut = notes.bad, notes.too_long, notes.num_cut


class _Chunks(Dataset):
    def __init__(self, sources: Sequence[RecordSource], processor: EvoTokLlavaProcessor, max_length: int) -> None:
        self._sources, self._processor, self._max_length = sources, processor, max_length
        self._chunks = [(s, start) for s, source in enumerate(sources) for start in range(0, len(source), _CHUNK)]

    def __len__(self) -> int:
        return len(self._chunks)

    def __getitem__(self, chunk: int) -> _Facts:
        number, start = self._chunks[chunk]
        source, notes = self._sources[number], _Notes()
        for row in range(start, min(start + _CHUNK, len(source))):
            try:
                records = source.records(row)
            except ValueError as error:
                notes.bad[source.row_name(row)] = str(error)
                continue
            for which, record in enumerate(records):
                self._look_at(record, (number, row, which), notes)
        return _Facts(notes)

    def _look_at(self, record: Record, place: tuple[int, int, int], notes: _Notes) -> None:
        try:
            whole = self._processor.lay_out(record.messages, drawn=record.drawn)
            layout = whole.cut_to(self._max_length)
        except ValueError as error:
            problems = notes.too_long if isinstance(error, TooLong) else notes.bad
            problems[_name(self._sources[place[0]], *place[1:])] = str(error)
            return
        notes.places.append(place)
        notes.kinds.append(KINDS.index(record.kind))
        notes.reads.append(record.reads)
        notes.lengths.append(layout.num_steps)
        notes.num_images.append(len(record.images))
        notes.images += record.images
        notes.stamps += record.stamps
        notes.num_cut += layout is not whole


# Put together ------------------------------------------------------------------------------------------------


def _join(sources: Sequence[RecordSource], facts: list[_Facts]) -> RecordScan:
    places, kinds, reads, lengths, num_images, digests, stamps = (
        np.concatenate([getattr(one, what) for one in facts])
        for what in ("places", "kinds", "reads", "lengths", "num_images", "digests", "stamps")
    )
    record_of = np.repeat(np.arange(len(places), dtype=np.int64), num_images)
    which = np.arange(len(record_of)) - np.repeat(np.cumsum(num_images) - num_images, num_images)
    first_use, image_of = _number_by_first_use(digests)
    image_places = np.column_stack([places[record_of[first_use]][:, :2], which[first_use]])
    is_first = np.zeros(len(digests), bool)
    is_first[first_use] = True
    uses = (key for one in facts for key in one.images)
    keys = PackedStrings(key for key, needed in zip(uses, is_first, strict=True) if needed)
    return RecordScan(
        records=RecordTable(sources, places, kinds, reads, lengths),
        images=RecordImages(sources, image_places, keys, stamps[first_use]),
        bad={name: why for one in facts for name, why in one.bad.items()},
        too_long={name: why for one in facts for name, why in one.too_long.items()},
        num_cut=sum(one.num_cut for one in facts),
        _record_of=record_of,
        _image_of=image_of,
    )


def _number_by_first_use(digests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Different digests in the order in which they are first used: where each is (images,), and which of them every
    use (uses,) means."""
    _, first_use, means = np.unique(digests, return_index=True, return_inverse=True)
    order = np.argsort(first_use)
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    return first_use[order], rank[means]
