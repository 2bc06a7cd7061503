"""Weighted mixing of sources: each source's share of a block, and the order of the sources within it."""

from collections.abc import Sequence

import numpy as np

BLOCK = 1_024
"""Number of consecutive samples within which every source gets exactly its share."""


def whole_shares(weights: Sequence[float], block: int = BLOCK) -> list[int]:
    """Split a block among sources in proportion to their weights: samples per source, which add up to `block`.

    Shares are rounded down; the samples left over go to the sources with the largest remainders.
    """
    exact = np.asarray(weights, float) / sum(weights) * block
    shares = np.floor(exact).astype(int)
    shares[np.argsort(shares - exact, kind="stable")[: block - shares.sum()]] += 1
    return shares.tolist()


def block_pattern(shares: Sequence[int], seed: Sequence[int]) -> np.ndarray:
    """The source of each position of a block, shuffled: source numbers (sum of shares,).

    Args:
        seed: seeds the shuffle; include the number of the block.
    """
    pattern = np.repeat(np.arange(len(shares)), shares)
    return np.random.default_rng(list(seed)).permutation(pattern)
