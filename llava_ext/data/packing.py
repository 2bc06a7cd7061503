"""Several samples in one row: which go together, and the batch that the model gets.

Lengths are LLM steps, as `ConversationDataset.lengths` has them: a text token is one, and so is an image's position,
though a drawn one stands in the flat sequence as a token a level; with the flat head each of these is one.

B rows, T flat tokens, I images read in the batch, N positions, L levels.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np
from torch.utils.data import Dataset

from evotok_plugin.errors import UserError
from llava_ext.data.dataset import Sample


def pack_lengths(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Which samples go into one row: best-fit decreasing, each into the fullest row that has room.

    The number of rows depends on the lengths alone, not on their order; among samples of one length the earlier comes
    first, so a shuffled order gives other rows.

    Returns:
        rows of indices into `lengths`; every index once.

    Raises:
        UserError: a length that is not in 1..capacity.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    wrong = np.flatnonzero((lengths < 1) | (lengths > capacity))
    if wrong.size:
        raise UserError(
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
