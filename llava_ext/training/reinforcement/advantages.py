"""Advantages and statistics of groups of drawings: the drawings of a group share their prompt.

G groups, n drawings each, N positions, L levels.
"""

from torch import Tensor

EPS = 1e-6  # added to a standard deviation


def group_advantages(rewards: Tensor) -> Tensor:
    """Rewards (G, n) relative to their group: (r - mean) / (std + eps), and 0 in a group of equal rewards.

    Source: equation in section 4.1.2 of arXiv 2402.03300, with the standard deviation of the group itself.
    """
    centered = rewards - rewards.mean(dim=1, keepdim=True)
    scaled = centered / (rewards.std(dim=1, correction=0, keepdim=True) + EPS)
    return scaled.masked_fill(~is_mixed(rewards)[:, None], 0.0)


def is_mixed(rewards: Tensor) -> Tensor:
    """Whether the rewards (G, n) of each group differ, (G,)."""
    return (rewards != rewards[:, :1]).any(dim=1)


def diversity(codes: Tensor) -> Tensor:
    """Mean over the pairs of a group of the share of positions whose level-0 codes differ: (G, n, N, L) -> (G,)."""
    first, count = codes[..., 0], codes.shape[1]
    differs = (first[:, :, None] != first[:, None]).float().mean(dim=-1)  # (G, n, n), 0 on the diagonal
    return differs.sum(dim=(1, 2)) / (count * (count - 1))
