"""Classifier-free guidance of logits.

R rows, K codes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# One number, or one per level: also as a float32 tensor (1 or L elements), which a recorded step reads again, or as a
# float32 tensor (R, L) with scales per row.
Scale = float | Sequence[float] | Tensor


def guided_logits(logits: Tensor, scale: float | Tensor, rescale: float = 0.0) -> Tensor:
    """Move the logits with the prompt away from those without: (2 R, K) -> (R, K) in float32.

    Args:
        logits: those with the prompt, then those without, in the same order.
        scale: weight of the difference between them; with 1 the result equals the logits with the prompt exactly.
            A number, or a float32 tensor without dimensions or with one number per row, (R, 1).
        rescale: share, 0 to 1, of the result that is scaled to the standard deviation of the logits with the prompt;
            large scales otherwise sharpen the distribution (Lin et al. 2023, arXiv 2305.08891, section 3.4).
    """
    conditional, unconditional = logits.float().chunk(2)  # the difference would be lost in half precision
    guided = torch.lerp(unconditional, conditional, scale)
    if rescale:
        wanted, found = (values.std(dim=-1, keepdim=True) for values in (conditional, guided))
        guided = guided * (1 + rescale * (wanted / found.clamp(min=torch.finfo(found.dtype).tiny) - 1))
    return guided


def scale_at_level(scale: Scale, level: int) -> float | Tensor:
    """The scale of one level: that of all levels if there is only one; (R, 1) if rows have their own."""
    if isinstance(scale, Tensor) and scale.ndim == 2:
        return scale[:, level, None]
    if isinstance(scale, Tensor):
        return scale.reshape(-1)[level if scale.numel() > 1 else 0]
    return scale[level] if isinstance(scale, Sequence) else scale
