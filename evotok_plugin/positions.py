"""Position embeddings for images whose size differs from that of training."""

import torch.nn.functional as F
from torch import Tensor


def resize_positions(table: Tensor, trained_side: int, grid: tuple[int, int]) -> Tensor:
    """Resize the position embeddings of a square grid, (side * side, D), to (rows * columns, D).

    Interpolates bicubically as SigLIP does, in float32 regardless of the dtype of the weights.

    Args:
        grid: rows and columns.
    """
    square = table.float().transpose(0, 1).unflatten(1, (trained_side, trained_side))[None]  # (1, D, side, side)
    resized = F.interpolate(square, size=grid, mode="bicubic", align_corners=False)
    return resized[0].flatten(1).transpose(0, 1).to(table.dtype)
