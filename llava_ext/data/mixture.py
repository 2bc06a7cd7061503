"""In which order the records of one or several sources are seen."""

from collections.abc import Sequence

import numpy as np

from evotok_plugin.errors import UserError

_BLOCK = 1_024  # records over which the sources' shares are kept


def check_weights(weights: Sequence[float] | None, num_sources: int) -> None:
    """Refuse weights that are not one a source.

    Raises:
        UserError: another number of them, or one that is not above 0.
    """
    if weights is not None and (len(weights) != num_sources or min(weights) <= 0):
        raise UserError(f"data_weights: expected {num_sources} above 0, one an entry of data_path, got {weights}")


class Mixture:
    """The order of every epoch, from the seed and the epoch's number alone.

    Without weights an epoch is every record once. With weights it is as many records as there are; of every 1024 in a
    row the sources get their shares, to the nearest whole number, and each source runs through all its records, in
    another order each time, before any comes again - from epoch to epoch it goes on where it was.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] | None = None, seed: int = 0) -> None:
        """
        Args:
            sizes: number of records of each source; they are numbered source after source.
            weights: one a source.

        Raises:
            UserError: weights that do not fit the sources, a share too small to be met, or a source without records.
        """
        check_weights(weights, len(sizes))
        self._sizes, self._seed = list(sizes), seed
        self._starts = np.cumsum([0, *sizes])
        self._shares = None if weights is None else _whole_shares(weights)
        if self._shares is not None:
            for number, (size, share) in enumerate(zip(sizes, self._shares, strict=True)):
                if not size or not share:
                    raise UserError(
                        f"entry {number} of data_path "
                        + ("has no usable records" if not size else f"would get less than 1 of {_BLOCK} records")
                        + "; leave it out"
                        + ("" if not size else " or raise its weight")
                    )

    def __len__(self) -> int:
        """Records of an epoch."""
        return int(self._starts[-1])

    def order(self, epoch: int) -> np.ndarray:
        """The records (len,) of an epoch by number."""
        if self._shares is None:
            return np.random.default_rng([self._seed, epoch]).permutation(len(self))
        first = epoch * len(self)
        blocks = range(first // _BLOCK, -(-(first + len(self)) // _BLOCK))
        sources = np.concatenate([self._block(block) for block in blocks])
        skipped = first - blocks.start * _BLOCK
        order = np.empty(len(self), np.int64)
        for number, share in enumerate(self._shares):
            where = np.flatnonzero(sources == number)
            before = blocks.start * share + int((where < skipped).sum())
            where = where[(where >= skipped) & (where < skipped + len(self))] - skipped
            order[where] = self._starts[number] + self._run(number, before, len(where))
        return order

    def _block(self, block: int) -> np.ndarray:
        """Which source each place of a block belongs to."""
        pattern = np.repeat(np.arange(len(self._shares)), self._shares)
        return np.random.default_rng([self._seed, 1, block]).permutation(pattern)

    def _run(self, number: int, first: int, count: int) -> np.ndarray:
        """Records `first` to `first + count` of a source's endless succession of shuffled rounds."""
        size = self._sizes[number]
        rounds = range(first // size, -(-(first + count) // size))
        orders = [np.random.default_rng([self._seed, 2, number, one]).permutation(size) for one in rounds]
        start = first - rounds.start * size
        return np.concatenate([np.empty(0, np.int64), *orders])[start : start + count]


def _whole_shares(weights: Sequence[float]) -> list[int]:
    """Shares of a block in whole records, the largest remainders rounded up."""
    exact = np.asarray(weights, float) / sum(weights) * _BLOCK
    shares = np.floor(exact).astype(int)
    shares[np.argsort(shares - exact, kind="stable")[: _BLOCK - shares.sum()]] += 1
    return shares.tolist()
