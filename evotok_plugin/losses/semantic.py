"""Semantic alignment with the teacher's features: cosine, and cosine per part of each feature vector."""

import torch.nn.functional as F
from torch import Tensor

from evotok_plugin.errors import UserError


def cosine_loss(features: Tensor, target: Tensor) -> Tensor:
    """Mean of 1 - cosine over all vectors; (..., D) both."""
    return (1 - F.cosine_similarity(features.float(), target.float(), dim=-1)).mean()


def folded_cosine_loss(features: Tensor, target: Tensor, num_parts: int = 4) -> Tensor:
    """Mean of 1 - cosine over the `num_parts` equal parts of each vector.

    Raises:
        UserError: D is not a multiple of `num_parts`.
    """
    if features.shape[-1] % num_parts:
        raise UserError(f"{features.shape[-1]} feature dimensions cannot be cut into {num_parts} equal parts")
    return cosine_loss(features.unflatten(-1, (num_parts, -1)), target.unflatten(-1, (num_parts, -1)))
