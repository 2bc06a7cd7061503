"""Gradients through the choice of codes: the straight-through estimator and the rotation trick."""

from collections.abc import Callable

import torch
from torch import Tensor

_SMALLEST_NORM = 1e-12
_SMALLEST_SUM = 1e-3  # length of the sum of two unit vectors, below which they are opposite


def straight_through(latents: Tensor, quantized: Tensor) -> Tensor:
    """The quantized latents (..., C), with the gradient of the latents (Bengio et al. 2013)."""
    return latents + (quantized - latents).detach()


def rotation(latents: Tensor, quantized: Tensor) -> Tensor:
    """The quantized latents (..., C), with the gradient of a constant rotation and scaling that maps latents to them.

    The rotation trick (Fifty et al. 2024, arXiv 2410.06424, section 4.2). Where a vector is zero or both are opposite,
    no such rotation is defined, and the gradient is straight-through.
    """
    e, q = latents.detach(), quantized.detach()
    e_norm, q_norm = e.norm(dim=-1, keepdim=True), q.norm(dim=-1, keepdim=True)
    e_unit, q_unit = e / e_norm.clamp_min(_SMALLEST_NORM), q / q_norm.clamp_min(_SMALLEST_NORM)
    middle, length = e_unit + q_unit, (e_unit + q_unit).norm(dim=-1, keepdim=True)
    is_defined = (e_norm > _SMALLEST_NORM) & (q_norm > _SMALLEST_NORM) & (length > _SMALLEST_SUM)
    middle = middle / length.clamp_min(_SMALLEST_SUM)
    rotated = (
        latents
        - 2 * (latents * middle).sum(dim=-1, keepdim=True) * middle
        + 2 * (latents * e_unit).sum(dim=-1, keepdim=True) * q_unit
    )
    path = torch.where(is_defined, rotated * (q_norm / e_norm.clamp_min(_SMALLEST_NORM)), latents)
    return with_gradient_of(q, path)


def with_gradient_of(values: Tensor, path: Tensor) -> Tensor:
    """Return `values` unchanged, with the gradient of `path`."""
    return values.detach() + (path - path.detach())


Gradient = Callable[[Tensor, Tensor], Tensor]
BY_NAME: dict[str, Gradient] = {"straight_through": straight_through, "rotation": rotation}
