"""Several samples in one row: which go together, and the batch that the model gets.

Lengths are LLM steps, as `ConversationDataset.lengths` has them: a text token is one, and so is an image's position,
though a drawn one stands in the flat sequence as a token a level; with the flat head each of these is one.

B rows, T flat tokens, I images read in the batch, N positions, L levels.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from llava_ext.data.dataset import Sample
from llava_ext.data.mixture import Mixture
from llava_ext.processing_evotok_llava import EvoTokLlavaProcessor


def pack_lengths(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Which samples go into one row: best-fit decreasing, each into the fullest row that has room.

    The number of rows depends on the lengths alone, not on their order; among samples of one length the earlier comes
    first, so a shuffled order gives other rows.

    Returns:
        rows of indices into `lengths`; every index once.

    Raises:
        ValueError: a length that is not in 1..capacity.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    wrong = np.flatnonzero((lengths < 1) | (lengths > capacity))
    if wrong.size:
        raise ValueError(
            f"sample {wrong[0]} has {lengths[wrong[0]]} steps, but a row holds 1 to {capacity}; "
            "cut samples to the row's length first, or give longer rows"
        )
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # rows by the steps still free in them
    rooms: list[int] = []  # its keys, in order
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        at = bisect_left(rooms, length)
        if at == len(rooms):
            row, room = len(rows), capacity
            rows.append([])
        else:
            room = rooms[at]
            row = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[at]
        rows[row].append(index)
        room -= length
        if room:
            if room not in by_room:
                by_room[room] = []
                insort(rooms, room)
            by_room[room].append(row)
    return rows


class PackingSampler(Sampler[list[int]]):
    """Rows of samples, for a `PackedDataset`: the samples of an epoch's order, packed and shuffled.

    All epochs have as many rows as the first. Where the order of a later one takes more or fewer, as weighted sources
    can have it, its rows end within another epoch: the rows of all orders make one succession, and no sample is lost.
    Rows follow from the arguments and the epoch alone, so a run that is resumed goes on at the right row. `epoch_of`
    is asked when iteration starts, because a resumed run never sees `set_epoch`.

    Args:
        lengths: LLM steps of each sample (len,).
        capacity: LLM steps of a row.
        order_of: the order of an epoch's samples; by default they are shuffled.

    Raises:
        ValueError: a sample that no row holds.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        capacity: int,
        seed: int,
        epoch_of: Callable[[], float],
        order_of: Callable[[int], np.ndarray] | None = None,
    ) -> None:
        self._lengths, self._capacity, self._seed = np.asarray(lengths, np.int64), capacity, seed
        self._epoch_of, self._order_of = epoch_of, order_of or Mixture([len(self._lengths)], seed=seed).order
        self._num_rows = len(self._rows(0))

    @property
    def efficiency(self) -> float:
        """Which share of the first epoch's steps holds samples."""
        return float(self._lengths[self._order_of(0)].sum()) / (self._num_rows * self._capacity)

    def __len__(self) -> int:
        return self._num_rows

    def __iter__(self) -> Iterator[list[int]]:
        first, before, order = int(self._epoch_of()) * self._num_rows, 0, 0
        while before < first + self._num_rows:
            rows = self._rows(order)
            yield from rows[max(0, first - before) : max(0, first + self._num_rows - before)]
            before, order = before + len(rows), order + 1

    def _rows(self, epoch: int) -> list[list[int]]:
        order = np.asarray(self._order_of(epoch))
        rows = pack_lengths(self._lengths[order], self._capacity)
        shuffled = np.random.default_rng([self._seed, epoch, 2]).permutation(len(rows))
        return [order[rows[row]].tolist() for row in shuffled]


class PackedDataset(Dataset):
    """Rows of a map-style data set of samples: `packed[[3, 5, 7]]` is the list of those samples."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        """Samples, not rows."""
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        self.dataset.set_epoch(epoch)

    def __getitem__(self, row: Sequence[int]) -> list[Sample]:
        return [self.dataset[index] for index in row]


@dataclass
class PackedCollator:
    """Rows of samples to one right-padded batch of `input_ids`, `labels`, `segment_ids` (B, T) and `image_codes`
    (I, N, L; absent when nothing is read).

    `segment_ids` number a row's samples from 1 and are 0 on padding. The first token of a sample is never learned.
    """

    processor: EvoTokLlavaProcessor

    def __call__(self, rows: Sequence[Sequence[Sample]]) -> dict[str, Tensor]:
        def flat(values: Callable[[int, Sample], Tensor], fill: int) -> Tensor:
            joined = [torch.cat([values(number, sample) for number, sample in enumerate(row, 1)]) for row in rows]
            return self.processor.pad(joined, fill, side="right")

        batch = {
            "input_ids": flat(lambda _, sample: sample.input_ids, 0),
            "labels": flat(lambda _, sample: sample.labels, -100),
            "segment_ids": flat(lambda number, sample: torch.full_like(sample.input_ids, number), 0),
        }
        read = [codes for row in rows for sample in row for codes in sample.read_codes]
        if read:
            batch["image_codes"] = torch.stack(read)
        return batch
