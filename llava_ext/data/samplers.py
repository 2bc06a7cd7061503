"""Order of samples: epochs, batches of one modality or of one length class, packed rows."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from llava_ext.data.dataset import Filler
from llava_ext.data.mixture import Mixture
from llava_ext.data.packing import pack_lengths

_CLASSES_A_DOUBLING = 2  # of length
_WINDOW = 50  # batches that are sorted together


class EpochSampler(Sampler[int]):
    """The order that `order_of(epoch)` gives.

    `epoch_of` is asked when iteration starts, because a resumed run never sees `set_epoch`.
    """

    def __init__(self, order_of: Callable[[int], np.ndarray], length: int, epoch_of: Callable[[], float]) -> None:
        self._order_of, self._length, self._epoch_of = order_of, length, epoch_of

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        yield from self._order_of(int(self._epoch_of())).tolist()


class FilledSampler(Sampler):
    """Another sampler, filled up at its end to a multiple of `multiple` with what is not learned.

    Processes must make equally many micro-batches of one size. Left to itself, accelerate repeats samples of the
    epoch's beginning for that, which would be learned twice.
    """

    def __init__(self, sampler: Sampler, multiple: int) -> None:
        self._sampler, self._multiple = sampler, multiple

    def __len__(self) -> int:
        return -(-len(self._sampler) // self._multiple) * self._multiple

    def __iter__(self) -> Iterator:
        last = None
        for last in self._sampler:
            yield last
        # A sampler of packed rows yields lists; one sample is filler enough for a row.
        filler = [Filler(last[0])] if isinstance(last, list) else Filler(last)
        for _ in range(len(self) - len(self._sampler)):
            yield filler


class ModalityGroupedSampler(Sampler[int]):
    """Batches of one kind each (read, draw, text) and of samples that are about as long as each other.

    Of every window of 50 batches in the epoch's order, samples of a kind are sorted by length and cut into batches,
    whose order is then shuffled; what fills no batch waits for the next window. Lengths within a factor of 1.4 count as
    one: samples of exactly one length tend to be of one question, and batches of one question teach badly. All follows
    from the order, `seed` and the epoch. `epoch_of` is asked when iteration starts, because a resumed run never sees
    `set_epoch`.

    Args:
        kinds, lengths: of each sample (len,).
        batch_size: samples that go through the model at once, on all processes together.
        order_of: the order of an epoch's samples; by default they are shuffled.
    """

    def __init__(
        self,
        kinds: Sequence,
        batch_size: int,
        seed: int,
        epoch_of: Callable[[], float],
        lengths: Sequence[int] | None = None,
        order_of: Callable[[int], np.ndarray] | None = None,
    ) -> None:
        self._kinds, self._batch_size, self._seed, self._epoch_of = np.asarray(kinds), batch_size, seed, epoch_of
        lengths = np.ones(len(self._kinds)) if lengths is None else np.maximum(lengths, 1)
        self._classes = np.floor(_CLASSES_A_DOUBLING * np.log2(lengths)).astype(np.int32)
        self._order_of = order_of or Mixture([len(self._kinds)], seed=seed).order

    def __len__(self) -> int:
        return len(self._kinds)

    def __iter__(self) -> Iterator[int]:
        epoch = int(self._epoch_of())
        rng, order = np.random.default_rng([self._seed, epoch, 1]), self._order_of(epoch)
        window, waiting = _WINDOW * self._batch_size, order[:0]
        for start in range(0, len(order), window):
            batches, waiting = self._batches(np.concatenate([waiting, order[start : start + window]]))
            for number in rng.permutation(len(batches)):
                yield from batches[number].tolist()
        yield from waiting.tolist()

    def _batches(self, samples: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        """Whole batches, and the samples that are left over."""
        batches, rest = [], []
        for kind in np.unique(self._kinds[samples]):
            mine = samples[self._kinds[samples] == kind]
            whole = len(mine) - len(mine) % self._batch_size
            by_length = mine[:whole][np.argsort(self._classes[mine[:whole]], kind="stable")]
            batches += list(by_length.reshape(-1, self._batch_size))
            rest.append(mine[whole:])
        return batches, np.concatenate(rest)


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
        UserError: a sample that no row holds.
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
