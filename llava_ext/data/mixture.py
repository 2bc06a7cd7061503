"""The order of records in every epoch, from one source or a weighted mixture of several."""

from collections.abc import Sequence

import numpy as np

from evotok_plugin.data.mixture import BLOCK, block_pattern, whole_shares
from evotok_plugin.errors import UserError


def check_weights(weights: Sequence[float] | None, num_sources: int) -> None:
    """Check that there is one weight above 0 per source.

    Raises:
        UserError: the number of weights differs from the number of sources, or one is not above 0.
    """
    if weights is not None and (len(weights) != num_sources or min(weights) <= 0):
        raise UserError(
            f"data_weights: expected {num_sources} above 0, one for each entry of data_path, got {list(weights)}"
        )


class Mixture:
    """The order of records in every epoch, determined by the seed and the number of the epoch.

    Without weights, an epoch is a permutation of all records. With weights, it has the same length; within every 1024
    consecutive records each source gets its share, rounded to a whole number. Each source goes through all its records
    in a new order every time before any record repeats, and continues across epochs.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] | None = None, seed: int = 0) -> None:
        """
        Args:
            sizes: number of records of each source; record numbers count through the sources in order.
            weights: one per source.

        Raises:
            UserError: weights that do not fit the sources, a share below one record per block, or a source without
                records.
        """
        check_weights(weights, len(sizes))
        self._sizes, self._seed = list(sizes), seed
        self._starts = np.cumsum([0, *sizes])
        self._shares = None if weights is None else whole_shares(weights)
        if self._shares is not None:
            for number, (size, share) in enumerate(zip(sizes, self._shares, strict=True)):
                if not size or not share:
                    raise UserError(
                        f"entry {number} of data_path "
                        + ("has no usable records" if not size else f"would get less than 1 of {BLOCK} records")
                        + "; leave it out"
                        + ("" if not size else " or raise its weight")
                    )

    def __len__(self) -> int:
        """The number of records in an epoch."""
        return int(self._starts[-1])

    def order(self, epoch: int) -> np.ndarray:
        """Record numbers (len,) of an epoch, in order."""
        shares = self._shares
        if shares is None:
            return np.random.default_rng([self._seed, epoch]).permutation(len(self))
        first = epoch * len(self)
        blocks = range(first // BLOCK, -(-(first + len(self)) // BLOCK))
        sources = np.concatenate([block_pattern(shares, [self._seed, 1, block]) for block in blocks])
        skipped = first - blocks.start * BLOCK
        order = np.empty(len(self), np.int64)
        for number, share in enumerate(shares):
            where = np.flatnonzero(sources == number)
            before = blocks.start * share + int((where < skipped).sum())
            where = where[(where >= skipped) & (where < skipped + len(self))] - skipped
            order[where] = self._starts[number] + self._run(number, before, len(where))
        return order

    def _run(self, number: int, first: int, count: int) -> np.ndarray:
        """Records `first` to `first + count` of a source's endless sequence of shuffled rounds."""
        size = self._sizes[number]
        rounds = range(first // size, -(-(first + count) // size))
        orders = [np.random.default_rng([self._seed, 2, number, one]).permutation(size) for one in rounds]
        start = first - rounds.start * size
        return np.concatenate([np.empty(0, np.int64), *orders])[start : start + count]
