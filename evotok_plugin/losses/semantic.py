"""Semantic alignment losses: cosine distance to the teacher's features, and cosine distance per part of each vector."""

import torch.nn.functional as F
from torch import Tensor

from evotok_plugin.errors import UserError


def cosine_loss(features: Tensor, target: Tensor) -> Tensor:
    """Mean of 1 - cosine over all vectors (..., D)."""
    return (1 - F.cosine_similarity(features.float(), target.float(), dim=-1)).mean()


def folded_cosine_loss(features: Tensor, target: Tensor, num_parts: int = 4) -> Tensor:
    """Mean of 1 - cosine over the `num_parts` equal parts of each vector (..., D).

    Raises:
        UserError: D is not a multiple of `num_parts`.
    """
    if features.shape[-1] % num_parts:
        raise UserError(
            f"the folded cosine loss splits features into {num_parts} equal parts, but the teacher's width "
            f"{features.shape[-1]} is not a multiple of {num_parts}; use another teacher"
        )
    return cosine_loss(features.unflatten(-1, (num_parts, -1)), target.unflatten(-1, (num_parts, -1)))
