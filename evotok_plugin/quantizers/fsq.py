"""Finite scalar quantization (Mentzer et al. 2023, arXiv 2309.15505), one grid per level of the residual.

d dimensions of a grid, which has K points.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from evotok_plugin.errors import UserError
from evotok_plugin.quantizers import gradients
from evotok_plugin.quantizers.base import ComputedCodebooks
from evotok_plugin.quantizers.fsq_grid import fsq_grid

_MARGIN = 1e-3  # by which the bound exceeds the outermost values, as in the paper
_SPREAD = 0.8  # standard deviation at which tanh of a normal variable is about uniform


class FiniteScalarQuantizer(ComputedCodebooks):
    """Residual quantizer whose levels round a few numbers each: no codebook is searched or restarted.

    A level maps the residual linearly to d numbers, bounds each by a tanh, rounds it to one of the values of its
    dimension, and maps the d rounded numbers back to the latents. The code is the index of the grid point, and the
    code vectors are the mapped points: `grid @ maps_out`. Both maps are learned, through the straight-through gradient
    of the rounding, from the decoders and from the codebook loss.

    Args:
        levels: number of values in each dimension of the grid; by default see `fsq_grid`.

    Raises:
        UserError: no grid has these sizes, the grid has more dimensions than the latents, or the gradient is another
            than "straight_through": the rotation trick is defined for the nearest code, not for rounding.
    """

    maps_in: Tensor
    maps_out: Tensor

    def __init__(
        self,
        num_quantizers: int,
        codebook_size: int,
        codebook_dim: int,
        levels: Sequence[int] = (),
        level_dropout: float = 0.0,
        gradient: str = "straight_through",
    ) -> None:
        super().__init__(num_quantizers, codebook_size, codebook_dim, level_dropout, gradient)
        self.levels = fsq_grid(codebook_size, levels)
        width = len(self.levels)
        if width > codebook_dim:
            raise UserError(
                f"a grid of {' x '.join(map(str, self.levels))} values has {width} dimensions, more than the latents "
                f"(codebook_dim {codebook_dim}); give fsq_levels with fewer and larger numbers"
            )
        if gradient != "straight_through":
            raise UserError(f"finite scalar quantization has the gradient straight_through, got {gradient!r}")
        shape = (num_quantizers, width, codebook_dim)
        self.maps_in = nn.Parameter(torch.empty(shape, dtype=torch.float32))
        self.maps_out = nn.Parameter(torch.empty(shape, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw normal maps that keep the standard deviation."""
        nn.init.normal_(self.maps_in, std=self.codebook_dim**-0.5)
        nn.init.normal_(self.maps_out, std=len(self.levels) ** -0.5)

    def _sizes(self, like: Tensor) -> Tensor:
        return torch.tensor(self.levels, dtype=like.dtype, device=like.device)

    def _bound(self, values: Tensor) -> Tensor:
        """Bounded values (..., d), which rounding maps to the whole numbers -n // 2 .. (n - 1) // 2."""
        sizes = self._sizes(values)
        half = (sizes - 1) * (1 + _MARGIN) / 2
        offset = (sizes % 2 == 0).to(values) / 2
        return torch.tanh(values + torch.atanh(offset / half)) * half - offset

    def _points(self, codes: Tensor, like: Tensor) -> Tensor:
        """Grid points of codes: (...) -> (..., d), from -1 on; the first dimension varies fastest."""
        digits = []
        for size in self.levels:
            digits.append((codes % size - size // 2).to(like) / (size // 2))
            codes = codes // size
        return torch.stack(digits, dim=-1)

    def _compute_codebooks(self) -> Tensor:
        maps = self.maps_out.double()
        return self._points(torch.arange(self.codebook_size, device=maps.device), maps) @ maps

    def _level_codes(self, residual: Tensor, level: int) -> Tensor:
        """The grid points nearest to the bounded numbers of a level: float64 (M, C) -> (M,)."""
        numbers = (
            self._bound(residual @ self.maps_in[level].detach().to(residual.device).double().T).round().nan_to_num()
        )
        codes, stride = residual.new_zeros(residual.shape[0], dtype=torch.long), 1
        for size, column in zip(self.levels, numbers.unbind(-1), strict=True):
            codes += stride * (column.long() + size // 2).clamp(0, size - 1)
            stride *= size
        return codes

    @torch.no_grad()
    def _search(self, vectors: Tensor, codebooks: Tensor) -> Tensor:
        place = vectors.device if vectors.device.type in ("cpu", "cuda") else torch.device("cpu")  # has float64
        residual, codes = vectors.to(place).double(), []
        for level, codebook in enumerate(codebooks.to(place)):
            codes.append(self._level_codes(residual, level))
            residual = residual - codebook[codes[-1]]
        return torch.stack(codes, dim=1).to(vectors.device)

    def _code_vectors(self, level: int, chosen: Tensor, residual: Tensor) -> Tensor:
        bounded = self._bound(residual @ self.maps_in[level].T) / (self._sizes(residual) // 2)
        return gradients.with_gradient_of(self._points(chosen, residual), bounded) @ self.maps_out[level]

    def _differentiable(self, latents: Tensor, codes: Tensor, sums: list[Tensor]) -> list[Tensor]:
        """The sums, with gradients to latents and maps; each level gets the residual with its gradient."""
        if not torch.is_grad_enabled() or not (latents.requires_grad or self.maps_out.requires_grad):
            return sums
        flat, found = latents.reshape(-1, latents.shape[-1]), []
        path = torch.zeros_like(flat)
        for level, total in enumerate(sums):
            before = sums[level - 1].view_as(flat) if level else torch.zeros_like(flat)
            residual = flat - gradients.with_gradient_of(before, path)
            path = path + self._code_vectors(level, codes[:, level], residual)
            found.append(gradients.with_gradient_of(total, path.view_as(total)))
        return found

    def _gradient(self) -> gradients.Gradient:
        return _as_it_is  # the sums have their own gradients

    @torch.no_grad()
    def init_from(self, latents: Tensor) -> None:
        """Initialize the maps of every level from sample latents (M, C).

        `maps_in` are the principal directions of the residuals, scaled so that all values of a dimension are about
        equally frequent; `maps_out` are the least-squares map from the grid points back to the residuals. With several
        processes, all must pass the same latents.
        """
        residual, width = latents.detach().double().reshape(-1, latents.shape[-1]), len(self.levels)
        for level in range(self.num_quantizers):
            values, vectors = torch.linalg.eigh((residual.T @ residual / residual.shape[0]).cpu())
            values, vectors = values.flip(0)[:width], vectors.flip(1)[:, :width]
            scales = _SPREAD / values.clamp_min(1e-12).sqrt()
            self.maps_in[level] = (scales[:, None] * vectors.T).to(self.maps_in)
            codes = self._level_codes(residual, level)
            points = self._points(codes, residual)
            gram = points.T @ points
            ridge = 1e-6 * gram.diagonal().mean().clamp_min(1e-6) * torch.eye(width).to(gram)
            self.maps_out[level] = torch.linalg.solve(gram + ridge, points.T @ residual).to(self.maps_out)
            residual = residual - points @ self.maps_out[level].double()


def _as_it_is(latents: Tensor, quantized: Tensor) -> Tensor:
    return quantized
