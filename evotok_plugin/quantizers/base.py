"""The interface of all quantizers: latents to codes level by level, and codes to latents.

M vectors (any leading shape), L levels, K codes per level, C dimensions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evotok_plugin.code_search import is_compiling, residual_codes
from evotok_plugin.errors import UserError
from evotok_plugin.quantizers import gradients


@dataclass
class Quantized:
    """Latents `z` (..., C) quantized with l levels.

    Attributes:
        codes: (..., l), one index per level.
        commitment_loss: mean over the depths d = 1..l of MSE(z, stop_grad(sum of levels 1..d)).
        codebook_loss: in training, the loss of codebooks that learn by gradients: mean over the levels of
            MSE(stop_grad(residual before the level), code vector); None if codebooks learn otherwise or are fixed.
    """

    codes: Tensor
    commitment_loss: Tensor
    _latents: Tensor
    _sums: list[Tensor]
    _kept: Tensor | None = None  # level dropout: the number of levels that each batch item keeps
    codebook_loss: Tensor | None = None
    _gradient: gradients.Gradient = gradients.straight_through

    def latents_at(self, depth: int) -> Tensor:
        """Sum of the first `depth` levels (..., C), with the gradient of the quantizer to the latents.

        Raises:
            ValueError: `depth` exceeds the number of levels that were searched, or is below 1.
        """
        if not 1 <= depth <= len(self._sums):
            raise ValueError(f"depth must be in 1..{len(self._sums)}, the levels that were searched, got {depth}")
        total = self._sums[depth - 1]
        if self._kept is not None:
            total = self._sums[0]
            for level in range(1, depth):
                total = torch.where(self._kept > level, self._sums[level], total)
        return self._gradient(self._latents, total)


class Quantizer(nn.Module):
    """Base of residual quantizers: the sum of one code vector per level approximates the latents.

    Whatever a kind of quantizer learns, its code vectors are the rows of `codebooks`: a level's code is an index into
    them, and the level leaves the residual minus that row. All tensors of a quantizer are in float32 and have one entry
    per level in their first dimension.

    Args:
        level_dropout: share of training batch items (first dimension) whose `latents_at` stop at a random depth, so
            that decoders learn to work with fewer levels; codes, losses and codebook updates use all levels.
        gradient: gradient of `latents_at` to the latents, "straight_through" or "rotation".

    Attributes:
        is_fixed: the codebooks stay as they are in training, too.

    Raises:
        UserError: `level_dropout` is not between 0 and 1, or the gradient is unknown.
    """

    if TYPE_CHECKING:  # a buffer or a property of the subclass

        @property
        def codebooks(self) -> Tensor:
            """Code vectors of all levels (L, K, C), without gradient."""

    def __init__(
        self,
        num_quantizers: int,
        codebook_size: int,
        codebook_dim: int,
        level_dropout: float = 0.0,
        gradient: str = "straight_through",
    ) -> None:
        super().__init__()
        if not 0 <= level_dropout <= 1:
            raise UserError(f"level_dropout must be between 0 and 1, got {level_dropout}")
        if gradient not in gradients.BY_NAME:
            raise UserError(f"gradient must be one of {', '.join(gradients.BY_NAME)}, got {gradient!r}")
        self.num_quantizers, self.codebook_size, self.codebook_dim = num_quantizers, codebook_size, codebook_dim
        self.level_dropout, self.gradient = level_dropout, gradient
        self.is_fixed = False

    def reset_parameters(self) -> None:
        """Draw the initial values of all tensors, through the functions of `torch.nn.init`."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Quantizer":
        """Move to a device like any module, but keep float32: rounded codebooks would give other codes."""
        before = {name: tensor.detach() for name, tensor in self._tensors().items()}
        super()._apply(fn, recurse)
        for name, tensor in self._tensors().items():
            if tensor.dtype != torch.float32 and not tensor.is_meta:
                exact = before[name].to(tensor.device, torch.float32)
                if name in self._buffers:
                    self._buffers[name] = exact
                else:
                    tensor.data = exact
        return self

    def _tensors(self) -> dict[str, Tensor]:
        return {**dict(self.named_parameters(recurse=False)), **dict(self.named_buffers(recurse=False))}

    def fix(self, persistent: bool = True) -> "Quantizer":
        """Keep the codebooks as they are from now on; returns the quantizer itself.

        Learned tensors become buffers: a host that casts, partitions or trains parameters does not touch them.

        Args:
            persistent: whether they remain in the state dict.
        """
        self.is_fixed = True
        for name, tensor in self._tensors().items():
            self._parameters.pop(name, None)
            self.register_buffer(name, tensor.detach(), persistent)
        return self

    # Quantization --------------------------------------------------------------------------------------------

    def forward(self, latents: Tensor, depth: int | None = None) -> Quantized:
        """Quantize latents (..., C); with `depth`, search only the first `depth` levels.

        Raises:
            UserError: `depth` is not in 1..num_quantizers.
            ValueError: the width of the latents is not that of the codes.
        """
        levels = self.num_quantizers if depth is None else depth
        if not 1 <= levels <= self.num_quantizers:
            raise UserError(f"depth must be in 1..{self.num_quantizers}, got {depth}")
        if latents.shape[-1] != self.codebook_dim:
            raise ValueError(f"expected latents (..., {self.codebook_dim}), got {tuple(latents.shape)}")
        # The choice of codes is made in float32: under autocast 2.6 % of the codes would change.
        with torch.autocast(latents.device.type, enabled=False):
            z = latents.float()
            flat, codebooks = z.detach().reshape(-1, z.shape[-1]), self.codebooks[:levels]
            codes = self._search(flat, codebooks)
            total, sums, losses = torch.zeros_like(flat), [], []
            for level in range(levels):
                total = total + F.embedding(codes[:, level], codebooks[level])
                sums.append(total.view(z.shape))
                losses.append(F.mse_loss(z, sums[-1]))
            kept = self._draw_depths(z) if self.training and self.level_dropout else None
            codebook_loss = self._learn(flat, codes, sums) if self.training and not self.is_fixed else None
            return Quantized(
                codes=codes.view(*z.shape[:-1], levels),
                commitment_loss=torch.stack(losses).mean(),
                codebook_loss=codebook_loss,
                _latents=z,
                _sums=self._differentiable(z, codes, sums),
                _kept=kept,
                _gradient=self._gradient(),
            )

    def _search(self, vectors: Tensor, codebooks: Tensor) -> Tensor:
        """Codes of vectors in float32: (M, C), (l, K, C) -> (M, l)."""
        return residual_codes(vectors, codebooks)

    def _learn(self, vectors: Tensor, codes: Tensor, sums: list[Tensor]) -> Tensor | None:
        """Update the codebooks of the searched levels, or return the loss whose gradient does.

        Args:
            vectors: (M, C).
            codes: (M, l).
            sums: for every depth 1..l the sum of the levels up to it.
        """
        raise NotImplementedError

    def _differentiable(self, latents: Tensor, codes: Tensor, sums: list[Tensor]) -> list[Tensor]:
        """The sums, for kinds whose code vectors have gradients of their own."""
        return sums

    def _gradient(self) -> gradients.Gradient:
        return gradients.BY_NAME[self.gradient]

    def _draw_depths(self, z: Tensor) -> Tensor:
        """Number of levels that each item keeps, shaped to broadcast with latents: (B, 1, ..)."""
        dropped = torch.rand(z.shape[0]) < self.level_dropout
        depths = torch.randint(1, self.num_quantizers + 1, (z.shape[0],))
        kept = torch.where(dropped, depths, self.num_quantizers)
        return kept.to(z.device).view(-1, *[1] * (z.ndim - 1))

    def codes_to_latents(self, codes: Tensor) -> Tensor:
        """Sum of the code vectors of the given levels: (..., l) -> (..., C)."""
        codebooks = self.codebooks
        total = F.embedding(codes[..., 0], codebooks[0])
        for level in range(1, codes.shape[-1]):
            total = total + F.embedding(codes[..., level], codebooks[level])
        return total

    def level_latents(self, codes: Tensor) -> Tensor:
        """Code vector of every level: (..., l) -> (..., l, C)."""
        levels = torch.arange(codes.shape[-1], device=codes.device)
        return self.codebooks[levels, codes]

    # State ---------------------------------------------------------------------------------------------------

    def init_from(self, latents: Tensor) -> None:
        """Initialize the levels one after the other from sample latents (M, C).

        With several processes, all must pass the same latents and use the same random numbers.
        """
        raise NotImplementedError

    def learning_state(self) -> dict[str, Tensor]:
        """State that a resumed run needs in addition to the state dict."""
        return {}

    def load_learning_state(self, state: dict[str, Tensor]) -> None:
        """Restore the result of `learning_state`.

        Raises:
            UserError: it belongs to codebooks of another shape or kind.
        """
        if state:
            raise UserError(
                f"the learning state has {', '.join(state)}, which {type(self).__name__} does not use; resume with the "
                "configuration of the saved run"
            )


class ComputedCodebooks(Quantizer):
    """Base of quantizers whose codebooks are computed from other tensors, and learned by gradients."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._computed: tuple[list[Tensor], list[int], Tensor] | None = None

    def _compute_codebooks(self) -> Tensor:
        """Code vectors of all levels (L, K, C) in float64."""
        raise NotImplementedError

    @property
    def codebooks(self) -> Tensor:
        """Code vectors of all levels (L, K, C), without gradient; outside training they are computed once.

        They are rounded from float64, so that they hardly ever depend on the device or on the number of threads.
        """
        with torch.no_grad(), torch.autocast(next(iter(self._tensors().values())).device.type, enabled=False):
            if (self.training and not self.is_fixed) or is_compiling():
                return self._compute_codebooks().float()
            # Aliases: they share the version counters, and keep the memory so that no other tensor gets its address.
            tensors = [tensor.detach() for tensor in self._tensors().values()]
            if any(tensor.is_inference() or tensor.is_meta for tensor in tensors):
                return self._compute_codebooks().float()
            versions = [tensor._version for tensor in tensors]
            if self._computed is not None:
                sources, known, codebooks = self._computed
                same = all(a.data_ptr() == b.data_ptr() for a, b in zip(sources, tensors, strict=True))
                if same and known == versions:
                    return codebooks
            codebooks = self._compute_codebooks().float()
            self._computed = (tensors, versions, codebooks)
            return codebooks

    def _learn(self, vectors: Tensor, codes: Tensor, sums: list[Tensor]) -> Tensor | None:
        residuals = [vectors, *(vectors - total.view_as(vectors) for total in sums[:-1])]
        losses = [
            F.mse_loss(self._code_vectors(level, codes[:, level], residual), residual)
            for level, residual in enumerate(residuals)
        ]
        return torch.stack(losses).mean()

    def _code_vectors(self, level: int, chosen: Tensor, residual: Tensor) -> Tensor:
        """Chosen code vectors of a level (M, C), with gradients to what is learned.

        Args:
            chosen: codes (M,).
            residual: what the level quantizes (M, C).
        """
        raise NotImplementedError
