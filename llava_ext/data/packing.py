"""Packing of several samples into one row.

Lengths are LLM steps, as in `ConversationDataset.lengths`: one per text token and one per position of an image. With
the flat head, a drawn image takes one per token, that is one per position and level.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np
from torch.utils.data import Dataset

from llava_ext.data.dataset import ConversationDataset, Filler, Sample


def pack_lengths(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Assign samples to rows by best fit, in their order: each goes into the fullest row that has room for it.

    Samples that are sorted by length first fill rows a little better, but then a row holds samples of equal length,
    which tend to be of one kind or ask one question, and a model that trains on such rows learns far less. In a
    shuffled order every row is a mixture.

    Returns:
        Rows of indices into `lengths`; every index occurs once.

    Raises:
        ValueError: a length is not in 1..capacity.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    wrong = np.flatnonzero((sizes < 1) | (sizes > capacity))
    if wrong.size:
        raise ValueError(
            f"sample {wrong[0]} has {sizes[wrong[0]]} steps, but a row holds 1 to {capacity}; "
            "truncate samples to the length of a row first"
        )
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # rows by their free steps
    rooms: list[int] = []  # the keys of `by_room`, sorted
    for index, length in enumerate(sizes.tolist()):
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


class PackedDataset(Dataset):
    """A data set that is indexed by rows: `packed[[3, 5, 7]]` is the list of these samples."""

    def __init__(self, dataset: ConversationDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        """The number of samples, not of rows."""
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        self.dataset.set_epoch(epoch)

    def __getitem__(self, row: Sequence[int | Filler]) -> list[Sample]:
        return [self.dataset[index] for index in row]
