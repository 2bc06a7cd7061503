"""Learned positions for images of another size than the model was trained on."""

import torch.nn.functional as F
from torch import Tensor


def resize_positions(table: Tensor, trained_side: int, grid: tuple[int, int]) -> Tensor:
    """Position embeddings of a square grid, (side * side, D), for `grid` (rows, columns): (rows * columns, D).

    Bicubic as SigLIP does it, in float32 whatever the weights are.
    """
    square = table.float().transpose(0, 1).unflatten(1, (trained_side, trained_side))[None]  # (1, D, side, side)
    resized = F.interpolate(square, size=grid, mode="bicubic", align_corners=False)
    return resized[0].flatten(1).transpose(0, 1).to(table.dtype)
