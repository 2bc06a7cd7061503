"""Residual vector quantization with codebooks that learn by exponential moving averages.

M vectors (any leading shape), L levels, K codes per level, C dimensions.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evotok_plugin.code_search import nearest_codes, residual_codes
from evotok_plugin.common.processes import Processes
from evotok_plugin.errors import UserError


def _draw_distant(vectors: Tensor, codebook: Tensor, count: int) -> Tensor:
    """Draw `count` vectors in proportion to their squared distance from their nearest code."""
    errors = (vectors - F.embedding(nearest_codes(vectors, codebook), codebook)).square().sum(dim=1)
    return vectors[torch.multinomial(errors + 1e-12, count, replacement=True)]


def _spread_codes(vectors: Tensor, count: int, num_rounds: int = 8) -> Tensor:
    """Initial codebook for k-means: a few uniform draws, then draws far from the codes so far (k-means++ in rounds)."""
    share = -(-count // num_rounds)
    codebook = vectors[torch.randint(vectors.shape[0], (share,), device=vectors.device)]
    while codebook.shape[0] < count:
        wanted = min(share, count - codebook.shape[0])
        codebook = torch.cat([codebook, _draw_distant(vectors, codebook, wanted)])
    return codebook.clone()


@dataclass
class Quantized:
    """Latents `z` (..., C) quantized with l levels.

    Attributes:
        codes: (..., l), one index per level.
        commitment_loss: mean over the depths d = 1..l of MSE(z, stop_grad(sum of levels 1..d)).
    """

    codes: Tensor
    commitment_loss: Tensor
    _latents: Tensor
    _sums: list[Tensor]
    _kept: Tensor | None = None  # level dropout: the number of levels that each batch item keeps

    def latents_at(self, depth: int) -> Tensor:
        """Sum of the first `depth` levels (..., C), with a straight-through gradient to the latents.

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
        return self._latents + (total - self._latents).detach()


class ResidualVectorQuantizer(nn.Module):
    """Residual vector quantizer: each level picks the code nearest to the residual that earlier levels leave.

    In training mode every call also updates the codebooks (van den Oord et al. 2017, appendix A.1) by exponential
    moving averages of how often each code is chosen and of the vectors that choose it. A code whose average count falls
    below `restart_threshold`, and that the batch does not use, is restarted at a random vector of the batch. During the
    first `warmup_steps` calls codes are only restarted, not averaged. With `restart_by_error` restarts prefer vectors
    far from their code, so that codes do not crowd in plain image regions. With several processes, each process gets
    codebooks that are bit-identical to those of a single process on the joint batch: the batches concatenated in rank
    order, with the random numbers of rank 0.

    With `is_fixed` the codebooks stay as they are in training, too.

    `level_dropout` is the share of training batch items (first dimension) whose `latents_at` stop at a random depth,
    so that decoders learn to work with fewer levels; codes, commitment loss and codebook updates use all levels.

    Raises:
        UserError: `level_dropout` is not between 0 and 1.
    """

    codebooks: Tensor

    def __init__(
        self,
        num_quantizers: int,
        codebook_size: int,
        codebook_dim: int,
        ema_decay: float = 0.99,
        restart_threshold: float = 1.0,
        warmup_steps: int = 0,
        restart_by_error: bool = False,
        level_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 <= level_dropout <= 1:
            raise UserError(f"level_dropout must be between 0 and 1, got {level_dropout}")
        self.num_quantizers, self.codebook_size = num_quantizers, codebook_size
        self.ema_decay, self.restart_threshold, self.warmup_steps = ema_decay, restart_threshold, warmup_steps
        self.restart_by_error, self.level_dropout = restart_by_error, level_dropout
        # Always float32, whatever the default dtype: rounded codebooks would give other codes.
        codebooks = torch.randn(num_quantizers, codebook_size, codebook_dim, dtype=torch.float32)
        self.register_buffer("codebooks", codebooks)
        # Learning state is not part of the model: it is created when training starts, and the trainer saves it.
        self._counts: Tensor | None = None
        self._steps = 0
        self.is_fixed = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ResidualVectorQuantizer":
        """Move to a device like any module, but keep float32: rounded codebooks would give other codes."""
        codebooks = self.codebooks
        super()._apply(fn, recurse)
        if self.codebooks.dtype != torch.float32 and not self.codebooks.is_meta:
            self.codebooks = codebooks.to(self.codebooks.device, torch.float32)
        if self._counts is not None:
            self._counts = self._counts.to(self.codebooks.device)
        return self

    def forward(self, latents: Tensor, depth: int | None = None) -> Quantized:
        """Quantize latents (..., C); with `depth`, search only the first `depth` levels.

        Raises:
            UserError: `depth` is not in 1..num_quantizers.
            ValueError: the width of the latents is not that of the codes.
        """
        levels = self.num_quantizers if depth is None else depth
        if not 1 <= levels <= self.num_quantizers:
            raise UserError(f"depth must be in 1..{self.num_quantizers}, got {depth}")
        if latents.shape[-1] != self.codebooks.shape[-1]:
            raise ValueError(f"expected latents (..., {self.codebooks.shape[-1]}), got {tuple(latents.shape)}")
        # The choice of codes is made in float32: under autocast 2.6 % of the codes would change.
        with torch.autocast(latents.device.type, enabled=False):
            z = latents.float()
            flat = z.detach().reshape(-1, z.shape[-1])
            codes = residual_codes(flat, self.codebooks[:levels])
            total, sums, losses = torch.zeros_like(flat), [], []
            for level in range(levels):
                total = total + F.embedding(codes[:, level], self.codebooks[level])
                sums.append(total.view(z.shape))
                losses.append(F.mse_loss(z, sums[-1]))
            kept = self._draw_depths(z) if self.training and self.level_dropout else None
            if self.training and not self.is_fixed:
                self._learn(flat, codes, sums)
        return Quantized(codes.view(*z.shape[:-1], levels), torch.stack(losses).mean(), z, sums, kept)

    def _draw_depths(self, z: Tensor) -> Tensor:
        """Number of levels that each item keeps, shaped to broadcast with latents: (B, 1, ..)."""
        dropped = torch.rand(z.shape[0]) < self.level_dropout
        depths = torch.randint(1, self.num_quantizers + 1, (z.shape[0],))
        kept = torch.where(dropped, depths, self.num_quantizers)
        return kept.to(z.device).view(-1, *[1] * (z.ndim - 1))

    def codes_to_latents(self, codes: Tensor) -> Tensor:
        """Sum of the code vectors of the given levels: (..., l) -> (..., C)."""
        total = F.embedding(codes[..., 0], self.codebooks[0])
        for level in range(1, codes.shape[-1]):
            total = total + F.embedding(codes[..., level], self.codebooks[level])
        return total

    def level_latents(self, codes: Tensor) -> Tensor:
        """Code vector of every level: (..., l) -> (..., l, C)."""
        levels = torch.arange(codes.shape[-1], device=codes.device)
        return self.codebooks[levels, codes]

    # Learning ------------------------------------------------------------------------------------------------

    def _ensure_counts(self) -> Tensor:
        if self._counts is None:
            self._counts = torch.ones(self.codebooks.shape[:2], device=self.codebooks.device)
        return self._counts

    @torch.compiler.disable
    @torch.no_grad()
    def _learn(self, vectors: Tensor, codes: Tensor, sums: list[Tensor]) -> None:
        """Update the codebooks of the searched levels.

        Args:
            vectors: (M, C).
            codes: (M, l).
            sums: for every depth 1..l the sum of the levels up to it.
        """
        counts, batch = self._ensure_counts(), _JointBatch(vectors)
        residuals = [vectors] + [vectors - total.view_as(vectors) for total in sums]
        peaks = batch.largest(torch.stack([residual.abs().amax() for residual in residuals[:-1]]))
        if all(map(math.isfinite, peaks)):  # else the loss is NaN or infinite and stops the run
            for level, peak in enumerate(peaks):
                before, after, chosen = residuals[level], residuals[level + 1], codes[:, level]
                self._learn_level(self.codebooks[level], counts[level], before, after, chosen, peak, batch)
        self._steps += 1

    def _learn_level(
        self,
        codebook: Tensor,
        counts: Tensor,
        vectors: Tensor,
        left: Tensor,
        chosen: Tensor,
        peak: float,
        batch: "_JointBatch",
    ) -> None:
        """Update one level's codebook (K, C) and counts (K,) in place.

        Args:
            vectors: residuals that the level quantizes (M, C); `peak` is their largest magnitude in the joint batch.
            left: residuals that it leaves (M, C).
            chosen: codes (M,).
        """
        # Integer sums do not depend on the order of summation, neither over ranks nor with atomic additions.
        unit = 2.0 ** (math.frexp(peak)[1] - 40)
        terms = F.pad(vectors.double().mul_(1 / unit).round_().long(), (0, 1), value=1)
        totals = terms.new_zeros(self.codebook_size, terms.shape[1]).index_add_(0, chosen, terms)
        batch.add_up(totals)
        occurrences = totals[:, -1]
        counts.lerp_(occurrences.to(counts.dtype), 1 - self.ema_decay)
        if self._steps >= self.warmup_steps:
            # EMA of sums over EMA of counts, rewritten as an update of the code itself: the sums need not be stored, a
            # code that did not occur stays where it is, and the counts gathered during warm-up do not shift any code.
            used = occurrences.nonzero()[:, 0]
            old = codebook[used].double()
            pull = totals[used, :-1] * unit - occurrences[used, None] * old
            codebook[used] = (old + (1 - self.ema_decay) * pull / counts[used, None]).float()
        # A code that this batch uses is alive even if its average is low.
        dead = ((counts < self.restart_threshold) & (occurrences == 0)).nonzero()[:, 0]
        if dead.numel():
            weights = left.double().square().sum(dim=1) + 1e-12 if self.restart_by_error else None
            codebook[dead] = batch.draw(vectors, dead.numel(), weights)
            counts[dead] = 1.0

    def learning_state(self) -> dict[str, Tensor]:
        """State that a resumed run needs in addition to the codebooks: EMA counts (L, K) and the number of steps."""
        return {"counts": self._ensure_counts(), "steps": torch.tensor(self._steps)}

    def load_learning_state(self, state: dict[str, Tensor]) -> None:
        """Restore the result of `learning_state`.

        Raises:
            UserError: the counts belong to codebooks of another shape.
        """
        if state["counts"].shape != self.codebooks.shape[:2]:
            raise UserError(
                f"the learning state has counts {tuple(state['counts'].shape)} (levels, codes), but the tokenizer's "
                f"codebooks need {tuple(self.codebooks.shape[:2])}; resume with the configuration of the saved run"
            )
        self._counts = state["counts"].to(self.codebooks.device).clone()
        self._steps = int(state["steps"])

    @torch.no_grad()
    def init_from(self, latents: Tensor, num_iterations: int = 10) -> None:
        """Initialize every codebook by k-means on the residuals of sample latents (M, C), level by level.

        With several processes, all must pass the same latents and use the same random numbers.
        """
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
        self._counts = None


class _JointBatch:
    """The batches of all processes, concatenated in rank order; with a single process, its own batch."""

    def __init__(self, vectors: Tensor) -> None:
        self._processes = Processes.current()
        own = torch.cat([torch.tensor([vectors.shape[0]]), torch.randint(2**62, (1,))])
        gathered = torch.stack(self._processes.gather_tensors(own))  # number of vectors and a seed of every process
        self._sizes: list[int] = gathered[:, 0].tolist()
        self._generator = torch.Generator().manual_seed(int(gathered[0, 1]))

    def largest(self, values: Tensor) -> list[float]:
        """Elementwise maximum over the processes; NaN counts as infinite."""
        return self._processes.largest(values.nan_to_num(nan=torch.inf, posinf=torch.inf)).tolist()

    def add_up(self, values: Tensor) -> None:
        """Sum over the processes, in place."""
        self._processes.add_up(values)

    def draw(self, vectors: Tensor, count: int, weights: Tensor | None) -> Tensor:
        """Draw `count` of the joint vectors: (count, C), uniform or in proportion to this rank's weights (M,)."""
        # Sorted uniform numbers, in the joint order: copies of one vector become neighbors in the codebook, where the
        # search settles ties cheaply.
        steps = torch.empty(count + 1, dtype=torch.float64).exponential_(generator=self._generator).cumsum(0)
        places = (steps[:-1] / steps[-1]).to(vectors.device)
        total = sum(self._sizes)
        if weights is None:
            index = (places * total).long()
        else:
            shares = self._all(weights).cumsum(0)
            index = torch.searchsorted(shares, places * shares[-1], right=True)
        index.clamp_(max=total - 1)
        if len(self._sizes) == 1:
            return vectors[index]
        own = index - sum(self._sizes[: self._processes.rank])
        mine = (own >= 0) & (own < vectors.shape[0])
        drawn = vectors.new_zeros(count, vectors.shape[1])
        drawn[mine] = vectors[own[mine]]
        self.add_up(drawn)  # the one rank that has a vector contributes it, the others add zeros
        return drawn

    def _all(self, values: Tensor) -> Tensor:
        """Values for the vectors of all ranks: (M,) -> (M of all ranks,)."""
        padded = F.pad(values, (0, max(self._sizes) - values.shape[0]))
        gathered = self._processes.gather_tensors(padded)
        return torch.cat([part[:size] for part, size in zip(gathered, self._sizes, strict=True)])
