"""Samplers: shuffled epochs, batches of one modality and similar lengths, packed rows.

`epoch_of` returns the current epoch and is called when iteration starts, because a resumed run never calls
`set_epoch`.
"""

from collections.abc import Callable, Iterator, Sequence, Sized
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from llava_ext.data.dataset import Filler
from llava_ext.data.mixture import Mixture
from llava_ext.data.packing import pack_lengths

_CLASSES_PER_DOUBLING = 2  # length classes per factor of 2
_WINDOW = 50  # batches that are sorted together


class EpochSampler(Sampler[int]):
    """Samples in the order of `order_of(epoch)`."""

    def __init__(self, order_of: Callable[[int], np.ndarray], length: int, epoch_of: Callable[[], float]) -> None:
        self._order_of, self._length, self._epoch_of = order_of, length, epoch_of

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        yield from self._order_of(int(self._epoch_of())).tolist()


class FilledSampler(Sampler):
    """Pads another sampler at its end to a multiple of `multiple` with a `Filler`, from which nothing is learned.

    All processes must run the same number of micro-batches of the same size. accelerate would otherwise repeat samples
    from the beginning of the epoch, which would then be learned twice.
    """

    def __init__(self, sampler: Sampler, multiple: int) -> None:
        assert isinstance(sampler, Sized)
        self._sampler, self._length = sampler, len(sampler)
        self._filled = -(-self._length // multiple) * multiple

    def __len__(self) -> int:
        return self._filled

    def __iter__(self) -> Iterator[Any]:
        last: Any = None
        for last in self._sampler:
            yield last
        # A sampler of packed rows yields lists; a row of a single filler is enough.
        filler = [Filler(last[0])] if isinstance(last, list) else Filler(last)
        for _ in range(self._filled - self._length):
            yield filler


class ModalityGroupedSampler(Sampler[int]):
    """Batches of one kind each (read, draw, text), of samples of similar lengths.

    In every window of 50 batches of the epoch's order, the samples of a kind are sorted by length and split into
    batches, and the batches are shuffled; samples that do not fill a batch move to the next window. Lengths within a
    factor of 1.4 count as equal: samples of exactly the same length tend to have the same question, and batches of a
    single question train poorly. The result is determined by the order, `seed` and the epoch.

    Args:
        kinds, lengths: of each sample (len,).
        batch_size: samples per micro-batch, on all processes together.
        order_of: the order of the samples in an epoch; by default they are shuffled.
    """

    def __init__(
        self,
        kinds: Sequence | np.ndarray,
        batch_size: int,
        seed: int,
        epoch_of: Callable[[], float],
        lengths: Sequence[int] | np.ndarray | None = None,
        order_of: Callable[[int], np.ndarray] | None = None,
    ) -> None:
        self._kinds, self._batch_size, self._seed, self._epoch_of = np.asarray(kinds), batch_size, seed, epoch_of
        sizes = np.ones(len(self._kinds)) if lengths is None else np.maximum(lengths, 1)
        self._classes = np.floor(_CLASSES_PER_DOUBLING * np.log2(sizes)).astype(np.int32)
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
        """Full batches, and the remaining samples."""
        batches, rest = [], []
        for kind in np.unique(self._kinds[samples]):
            mine = samples[self._kinds[samples] == kind]
            whole = len(mine) - len(mine) % self._batch_size
            by_length = mine[:whole][np.argsort(self._classes[mine[:whole]], kind="stable")]
            batches += list(by_length.reshape(-1, self._batch_size))
            rest.append(mine[whole:])
        return batches, np.concatenate(rest)


class PackingSampler(Sampler[list[int]]):
    """Rows of samples for a `PackedDataset`: the order of an epoch, packed, in shuffled rows.

    All epochs have as many rows as the first. The order of a later epoch can need a few more or fewer: the rows of all
    orders form one sequence that is divided evenly into epochs, so that no sample is lost. Rows depend only on the
    arguments and the epoch, so a resumed run continues at the right row.

    Args:
        lengths: LLM steps of each sample (len,).
        capacity: LLM steps of a row.
        order_of: the order of the samples in an epoch; by default they are shuffled.

    Raises:
        ValueError: a sample does not fit a row.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
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
        """The fraction of the steps of the first epoch that holds samples instead of padding."""
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
