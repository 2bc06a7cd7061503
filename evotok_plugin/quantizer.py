"""Residual vector quantization with codebooks that learn by exponential moving averages.

M vectors (any leading shape), L levels, K codes a level, C dimensions.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# Scores are made in blocks of at most this many vectors by this many codes, never vectors x codes.
_VECTOR_BLOCK, _CODE_BLOCK = 1024, 4096
_FORGOTTEN = 1e-4  # EMA count below which a code keeps its place


def nearest_codes(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Index of the Euclidean nearest code: (M, C), (K, C) -> (M,).

    Exact in fp32: ||x - c||^2 is smallest where x.c - ||c||^2 / 2 is largest, and the winner is kept block by block.
    """
    half_norms = codebook.square().sum(dim=1) / 2
    result = torch.empty(vectors.shape[0], dtype=torch.long, device=vectors.device)
    for start in range(0, vectors.shape[0], _VECTOR_BLOCK):
        block = vectors[start : start + _VECTOR_BLOCK]
        best = None
        for first in range(0, codebook.shape[0], _CODE_BLOCK):
            codes = codebook[first : first + _CODE_BLOCK]
            scores = torch.addmm(half_norms[first : first + _CODE_BLOCK], block, codes.T, beta=-1)
            top, index = scores.max(dim=1)
            if best is None:
                best, winner = top, index
            else:
                better = top > best
                best, winner = torch.where(better, top, best), torch.where(better, index + first, winner)
        result[start : start + _VECTOR_BLOCK] = winner
    return result


def _sample_by_error(vectors: Tensor, codebook: Tensor, chosen: Tensor, count: int) -> Tensor:
    """Indices of `count` vectors, drawn in proportion to their squared distance from their code."""
    errors = (vectors - codebook[chosen]).square().sum(dim=1)
    return torch.multinomial(errors + 1e-12, count, replacement=True)


def _spread_codes(vectors: Tensor, count: int, num_rounds: int = 8) -> Tensor:
    """Start for k-means: a few uniform picks, then picks where the codes so far are far off (k-means++ in rounds)."""
    share = -(-count // num_rounds)
    codebook = vectors[torch.randint(vectors.shape[0], (share,), device=vectors.device)]
    while codebook.shape[0] < count:
        wanted = min(share, count - codebook.shape[0])
        index = _sample_by_error(vectors, codebook, nearest_codes(vectors, codebook), wanted)
        codebook = torch.cat([codebook, vectors[index]])
    return codebook.clone()


@dataclass
class Quantized:
    """Result of quantizing latents `z`.

    Attributes:
        codes: (..., l), one index a level.
        commitment_loss: mean over levels of MSE(z, stop_grad(sum of levels 1..l)).
    """

    codes: Tensor
    commitment_loss: Tensor
    _latents: Tensor
    _sums: list[Tensor]

    def latents_at(self, depth: int) -> Tensor:
        """Sum of the first `depth` levels (..., C), with the gradient passed straight through to the latents."""
        if not 1 <= depth <= len(self._sums):
            raise ValueError(f"depth must lie in 1..{len(self._sums)}, the levels that were searched, got {depth}")
        return self._latents + (self._sums[depth - 1] - self._latents).detach()


class ResidualVectorQuantizer(nn.Module):
    """Level by level, the nearest code to what the levels before have left.

    In training mode every call also moves the codebooks (van den Oord et al. 2017, appendix A.1): EMA of how often a
    code is chosen and of the vectors that chose it. A code whose average count falls below `restart_threshold` is
    set to a random vector of the batch; codes in use are left alone. During the first `warmup_steps` calls nothing
    is averaged, only restarted. With `restart_by_error` vectors far from their code are likelier to be taken, so
    that codes do not crowd where images are plain. With several processes counts and sums are those of the joint batch.
    """

    def __init__(
        self,
        num_quantizers: int,
        codebook_size: int,
        codebook_dim: int,
        ema_decay: float = 0.99,
        restart_threshold: float = 1.0,
        warmup_steps: int = 0,
        restart_by_error: bool = False,
    ) -> None:
        super().__init__()
        self.num_quantizers, self.codebook_size = num_quantizers, codebook_size
        self.ema_decay, self.restart_threshold, self.warmup_steps = ema_decay, restart_threshold, warmup_steps
        self.restart_by_error = restart_by_error
        self.register_buffer("codebooks", torch.randn(num_quantizers, codebook_size, codebook_dim))
        # Learning state is no part of the model: it is made when training starts and saved by the trainer.
        self._counts: Tensor | None = None
        self._sums: Tensor | None = None
        self._steps = 0

    def forward(self, latents: Tensor, depth: int | None = None) -> Quantized:
        """Quantize latents (..., C); with `depth` only the first levels are searched.

        Raises:
            ValueError: `depth` is not one of 1..num_quantizers.
        """
        levels = self.num_quantizers if depth is None else depth
        if not 1 <= levels <= self.num_quantizers:
            raise ValueError(f"depth must lie in 1..{self.num_quantizers}, got {depth}")
        # What chooses codes is fp32: under autocast 2.6 % of the codes would change.
        with torch.autocast(latents.device.type, enabled=False):
            z = latents.float()
            flat = z.detach().reshape(-1, z.shape[-1])
            total, codes, sums, losses = torch.zeros_like(flat), [], [], []
            for level in range(levels):
                residual = flat - total
                chosen = nearest_codes(residual, self.codebooks[level])
                total = total + F.embedding(chosen, self.codebooks[level])
                if self.training:
                    self._learn(level, residual, chosen)
                codes.append(chosen.view(z.shape[:-1]))
                sums.append(total.view(z.shape))
                losses.append(F.mse_loss(z, sums[-1]))
            if self.training:
                self._steps += 1
        return Quantized(torch.stack(codes, dim=-1), torch.stack(losses).mean(), z, sums)

    def codes_to_latents(self, codes: Tensor) -> Tensor:
        """Sum of the code vectors of the levels given: (..., l) -> (..., C)."""
        total = F.embedding(codes[..., 0], self.codebooks[0])
        for level in range(1, codes.shape[-1]):
            total = total + F.embedding(codes[..., level], self.codebooks[level])
        return total

    def level_latents(self, codes: Tensor) -> Tensor:
        """The code vector of every level: (..., l) -> (..., l, C)."""
        levels = torch.arange(codes.shape[-1], device=codes.device)
        return self.codebooks[levels, codes]

    # Learning ------------------------------------------------------------------------------------------------

    def _ensure_state(self) -> None:
        if self._counts is None:
            self._counts = torch.ones(self.codebooks.shape[:2], device=self.codebooks.device)
            self._sums = self.codebooks.clone()

    @torch.no_grad()
    def _learn(self, level: int, vectors: Tensor, chosen: Tensor) -> None:
        self._ensure_state()
        counts = torch.bincount(chosen, minlength=self.codebook_size).to(vectors.dtype)
        sums = torch.zeros_like(self.codebooks[level]).index_add_(0, chosen, vectors)
        candidates = vectors[self._draw_candidates(vectors, self.codebooks[level], chosen)]
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(counts)
            dist.all_reduce(sums)
            dist.broadcast(candidates, src=0)
        warming_up = self._steps < self.warmup_steps
        self._counts[level].lerp_(counts, 1 - self.ema_decay)
        if not warming_up:
            self._sums[level].lerp_(sums, 1 - self.ema_decay)
            seen = self._counts[level] > _FORGOTTEN  # the rest has faded; dividing would only give noise
            self.codebooks[level][seen] = self._sums[level][seen] / self._counts[level][seen, None]
        # A code that this batch used is alive, whatever its average says.
        dead = (self._counts[level] < self.restart_threshold) & (counts == 0)
        self.codebooks[level][dead] = candidates[dead]
        self._sums[level][dead] = candidates[dead]
        self._counts[level][dead] = 1.0

    def _draw_candidates(self, vectors: Tensor, codebook: Tensor, chosen: Tensor) -> Tensor:
        """Which vectors of the batch dead codes may move to: uniform, or likelier where the error is large."""
        if not self.restart_by_error:
            return torch.randint(vectors.shape[0], (self.codebook_size,), device=vectors.device)
        return _sample_by_error(vectors, codebook, chosen, self.codebook_size)

    def learning_state(self) -> dict[str, Tensor]:
        """What a resumed run needs beside the codebooks."""
        self._ensure_state()
        return {"counts": self._counts, "sums": self._sums, "steps": torch.tensor(self._steps)}

    def load_learning_state(self, state: dict[str, Tensor]) -> None:
        """Restore what `learning_state` gave."""
        device = self.codebooks.device
        self._counts, self._sums = state["counts"].to(device).clone(), state["sums"].to(device).clone()
        self._steps = int(state["steps"])

    @torch.no_grad()
    def init_from(self, latents: Tensor, num_iterations: int = 10) -> None:
        """Set every codebook by k-means on the residuals of sample latents (M, C), level after level."""
        residual = latents.detach().float().reshape(-1, latents.shape[-1])
        for level in range(self.num_quantizers):
            codebook = _spread_codes(residual, self.codebook_size)
            for _ in range(num_iterations):
                chosen = nearest_codes(residual, codebook)
                counts = torch.bincount(chosen, minlength=self.codebook_size).to(residual.dtype)
                sums = torch.zeros_like(codebook).index_add_(0, chosen, residual)
                filled = counts > 0
                codebook[filled] = sums[filled] / counts[filled, None]
            self.codebooks[level] = codebook
            residual = residual - F.embedding(nearest_codes(residual, codebook), codebook)
        self._counts = self._sums = None
