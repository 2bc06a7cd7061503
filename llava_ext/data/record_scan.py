"""Scan of all records before training: validity, length and images of each.

The scan is distributed over the processes of a run and the data-loading processes of each. Its result takes a few bytes
per record, plus the key of each distinct image.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Generator
from torch.utils.data import DataLoader, Dataset

from evotok_plugin.common.processes import Processes
from evotok_plugin.common.progress import progress_bar
from evotok_plugin.data.keys import PackedStrings, key_digests
from evotok_plugin.errors import UserError
from llava_ext.data.record_sources import RecordSource
from llava_ext.data.record_table import RecordImages, RecordTable, record_name
from llava_ext.data.records import KINDS, Record
from llava_ext.processing_evotok_llava import EvoTokLlavaProcessor
from llava_ext.sequence_layout import TooLong

NUM_EXAMPLES = 3  # of prompts that were descriptions
_CHUNK = 256  # rows that a data-loading process scans at a time


@dataclass
class RecordScan:
    """The result of a scan.

    Attributes:
        records: the usable records.
        images: all images that they need.
        bad: reasons why records are invalid, by their names.
        too_long: reasons why records cannot be truncated to the maximum length, by their names.
        num_cut: number of usable records that are truncated.
        num_from_descriptions: number of usable records that draw the image of a conversation that describes it.
        examples: prompts of the first of these records.
    """

    records: RecordTable
    images: RecordImages
    bad: dict[str, str]
    too_long: dict[str, str]
    num_cut: int
    num_from_descriptions: int
    examples: list[str]
    _record_of: np.ndarray  # (uses,): the record of each use of an image
    _image_of: np.ndarray  # (uses,): the image

    @property
    def num_records(self) -> int:
        """The number of all records, usable or not."""
        return len(self.records) + len(self.bad) + len(self.too_long)

    def needing(self, broken: dict[str, str]) -> dict[int, str]:
        """The records that need a broken image, with the reason.

        Args:
            broken: reasons by the keys of the broken images.
        """
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
    """Scan every record of several sources. All processes must call this; all get the same result.

    Args:
        max_length: maximum LLM steps of a record. A longer record is truncated, or left out if that would cut an image
            or leave nothing to learn.
        num_workers: data-loading processes per process, at least 1.
    """
    chunks = _Chunks(sources, processor, max_length)
    mine = range(processes.rank, len(chunks), processes.world_size)
    loader = DataLoader(
        chunks,
        batch_size=None,
        sampler=mine,
        collate_fn=_identity,
        num_workers=max(1, min(num_workers, len(mine))),
        generator=Generator(),  # without one it would advance the global random state
    )
    hidden = not (show_progress and processes.is_first)
    bar = progress_bar(loader, desc="checking records", unit="chunk", disable=hidden)
    parts = processes.gather(list(bar))
    return _join(sources, [parts[n % len(parts)][n // len(parts)] for n in range(len(chunks))])


def _identity(findings: Any) -> Any:
    return findings


# Scan of a chunk ---------------------------------------------------------------------------------------------


@dataclass
class _Findings:
    """Lists over the usable records of a chunk; `images` and `stamps` are over the images of these records."""

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
    num_from_descriptions: int = 0
    examples: list[str] = field(default_factory=list)


class _PackedFindings:
    """`_Findings` in arrays, which are cheap to send to other processes."""

    def __init__(self, findings: _Findings) -> None:
        self.places = np.array(findings.places, np.int64).reshape(-1, 3)
        self.kinds, self.lengths = np.array(findings.kinds, np.uint8), np.array(findings.lengths, np.int32)
        self.reads = np.array(findings.reads, bool)
        self.num_images, self.images = np.array(findings.num_images, np.int32), PackedStrings(findings.images)
        self.digests, self.stamps = key_digests(findings.images), np.array(findings.stamps, "S16")
        self.bad, self.too_long, self.num_cut = findings.bad, findings.too_long, findings.num_cut
        self.num_from_descriptions, self.examples = findings.num_from_descriptions, findings.examples


class _Chunks(Dataset):
    def __init__(self, sources: Sequence[RecordSource], processor: EvoTokLlavaProcessor, max_length: int) -> None:
        self._sources, self._processor, self._max_length = sources, processor, max_length
        self._chunks = [(s, start) for s, source in enumerate(sources) for start in range(0, len(source), _CHUNK)]

    def __len__(self) -> int:
        return len(self._chunks)

    def __getitem__(self, chunk: int) -> _PackedFindings:
        number, start = self._chunks[chunk]
        source, findings = self._sources[number], _Findings()
        for row in range(start, min(start + _CHUNK, len(source))):
            try:
                records = source.records(row)
            except UserError as error:
                findings.bad[source.row_name(row)] = str(error)
                continue
            for which, record in enumerate(records):
                self._scan(record, (number, row, which), findings)
        return _PackedFindings(findings)

    def _scan(self, record: Record, place: tuple[int, int, int], findings: _Findings) -> None:
        try:
            layout = self._processor.lay_out(record.messages, drawn=record.drawn)
            cut = layout.cut_to(self._max_length)
        except UserError as error:
            problems = findings.too_long if isinstance(error, TooLong) else findings.bad
            problems[record_name(self._sources[place[0]], *place[1:])] = str(error)
            return
        findings.places.append(place)
        findings.kinds.append(KINDS.index(record.kind))
        findings.reads.append(record.reads)
        findings.lengths.append(cut.num_steps)
        findings.num_images.append(len(record.images))
        findings.images += record.images
        findings.stamps += record.stamps
        findings.num_cut += cut is not layout
        if record.is_from_description:
            findings.num_from_descriptions += 1
            if len(findings.examples) < NUM_EXAMPLES:
                findings.examples.append(record.messages[0]["content"])


# Joining of chunks ------------------------------------------------------------------------------------------------


def _join(sources: Sequence[RecordSource], chunks: list[_PackedFindings]) -> RecordScan:
    places, kinds, reads, lengths, num_images, digests, stamps = (
        np.concatenate([getattr(chunk, name) for chunk in chunks])
        for name in ("places", "kinds", "reads", "lengths", "num_images", "digests", "stamps")
    )
    record_of = np.repeat(np.arange(len(places), dtype=np.int64), num_images)
    which = np.arange(len(record_of)) - np.repeat(np.cumsum(num_images) - num_images, num_images)
    first_use, image_of = _number_by_first_use(digests)
    image_places = np.column_stack([places[record_of[first_use]][:, :2], which[first_use]])
    is_first = np.zeros(len(digests), bool)
    is_first[first_use] = True
    uses = (key for chunk in chunks for key in chunk.images)
    keys = PackedStrings(key for key, needed in zip(uses, is_first, strict=True) if needed)
    return RecordScan(
        records=RecordTable(sources, places, kinds, reads, lengths),
        images=RecordImages(sources, image_places, keys, stamps[first_use]),
        bad={name: why for chunk in chunks for name, why in chunk.bad.items()},
        too_long={name: why for chunk in chunks for name, why in chunk.too_long.items()},
        num_cut=sum(chunk.num_cut for chunk in chunks),
        num_from_descriptions=sum(chunk.num_from_descriptions for chunk in chunks),
        examples=[example for chunk in chunks for example in chunk.examples][:NUM_EXAMPLES],
        _record_of=record_of,
        _image_of=image_of,
    )


def _number_by_first_use(digests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number the distinct digests in the order of their first use.

    Returns:
        The position of the first use of each distinct digest (images,), and the number of the digest of each use
        (uses,).
    """
    _, first_use, inverse = np.unique(digests, return_index=True, return_inverse=True)
    order = np.argsort(first_use)
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    return first_use[order], rank[inverse]
