"""Residual vector quantization with codebooks that learn by exponential moving averages.

M vectors (any leading shape), L levels, K codes a level, C dimensions.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from evotok_plugin.code_search import nearest_codes, residual_codes
from evotok_plugin.errors import UserError


def _far_off(vectors: Tensor, codebook: Tensor, count: int) -> Tensor:
    """`count` of the vectors, drawn in proportion to their squared distance from their nearest code."""
    errors = (vectors - F.embedding(nearest_codes(vectors, codebook), codebook)).square().sum(dim=1)
    return vectors[torch.multinomial(errors + 1e-12, count, replacement=True)]


def _spread_codes(vectors: Tensor, count: int, num_rounds: int = 8) -> Tensor:
    """Start for k-means: a few uniform picks, then picks where the codes so far are far off (k-means++ in rounds)."""
    share = -(-count // num_rounds)
    codebook = vectors[torch.randint(vectors.shape[0], (share,), device=vectors.device)]
    while codebook.shape[0] < count:
        wanted = min(share, count - codebook.shape[0])
        codebook = torch.cat([codebook, _far_off(vectors, codebook, wanted)])
    return codebook.clone()


@dataclass
class Quantized:
    """Result of quantizing latents `z` (..., C) with l levels.

    Attributes:
        codes: (..., l), one index a level.
        commitment_loss: mean over levels of MSE(z, stop_grad(sum of levels 1..l)).
    """

    codes: Tensor
    commitment_loss: Tensor
    _latents: Tensor
    _sums: list[Tensor]
    _kept: Tensor | None = None  # level dropout: how many levels each item of the batch keeps

    def latents_at(self, depth: int) -> Tensor:
        """Sum of the first `depth` levels (..., C), with the gradient passed straight through to the latents.

        Raises:
            UserError: `depth` is not one of the levels that were searched.
        """
        if not 1 <= depth <= len(self._sums):
            raise UserError(f"depth must lie in 1..{len(self._sums)}, the levels that were searched, got {depth}")
        total = self._sums[depth - 1]
        if self._kept is not None:
            total = self._sums[0]
            for level in range(1, depth):
                total = torch.where(self._kept > level, self._sums[level], total)
        return self._latents + (total - self._latents).detach()


class ResidualVectorQuantizer(nn.Module):
    """Level by level, the nearest code to what the levels before have left.

    In training mode every call also moves the codebooks (van den Oord et al. 2017, appendix A.1): EMA of how often a
    code is chosen and of the vectors that chose it. A code whose average count falls below `restart_threshold` is
    set to a random vector of the batch; codes in use are left alone. During the first `warmup_steps` calls nothing
    is averaged, only restarted. With `restart_by_error` vectors far from their code are likelier to be taken, so
    that codes do not crowd where images are plain. With several processes every one of them gets, to the bit, the
    codebooks that one process gets from the joint batch: the batches one after another by rank, and the random
    numbers of rank 0.

    `level_dropout` is the share of items of a training batch (first dimension) whose `latents_at` stop at a random
    depth, so that decoders learn to do with fewer levels; codes, commitment loss and learning keep all of them.

    Raises:
        UserError: `level_dropout` is no share.
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
        level_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 <= level_dropout <= 1:
            raise UserError(f"level_dropout is a share of the batch, expected 0..1, got {level_dropout}")
        self.num_quantizers, self.codebook_size = num_quantizers, codebook_size
        self.ema_decay, self.restart_threshold, self.warmup_steps = ema_decay, restart_threshold, warmup_steps
        self.restart_by_error, self.level_dropout = restart_by_error, level_dropout
        # float32 whatever the default is: rounded codebooks would give other codes.
        codebooks = torch.randn(num_quantizers, codebook_size, codebook_dim, dtype=torch.float32)
        self.register_buffer("codebooks", codebooks)
        # Learning state is no part of the model: it is made when training starts and saved by the trainer.
        self._counts: Tensor | None = None
        self._steps = 0

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ResidualVectorQuantizer":
        """Moves to devices as any module, but stays in float32: rounded codebooks would give other codes."""
        codebooks = self.codebooks
        super()._apply(fn, recurse)
        if self.codebooks.dtype != torch.float32 and not self.codebooks.is_meta:
            self.codebooks = codebooks.to(self.codebooks.device, torch.float32)
        if self._counts is not None:
            self._counts = self._counts.to(self.codebooks.device)
        return self

    def forward(self, latents: Tensor, depth: int | None = None) -> Quantized:
        """Quantize latents (..., C); with `depth` only the first levels are searched.

        Raises:
            UserError: `depth` is not one of 1..num_quantizers, or the latents are of another width than the codes.
        """
        levels = self.num_quantizers if depth is None else depth
        if not 1 <= levels <= self.num_quantizers:
            raise UserError(f"depth must lie in 1..{self.num_quantizers}, got {depth}")
        if latents.shape[-1] != self.codebooks.shape[-1]:
            raise UserError(f"expected latents (..., {self.codebooks.shape[-1]}), got {tuple(latents.shape)}")
        # What chooses codes is fp32: under autocast 2.6 % of the codes would change.
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
            if self.training:
                self._learn(flat, codes, sums)
        return Quantized(codes.view(*z.shape[:-1], levels), torch.stack(losses).mean(), z, sums, kept)

    def _draw_depths(self, z: Tensor) -> Tensor:
        """Levels that each item keeps, shaped to stand beside latents: (B, 1, ..)."""
        dropped = torch.rand(z.shape[0]) < self.level_dropout
        depths = torch.randint(1, self.num_quantizers + 1, (z.shape[0],))
        kept = torch.where(dropped, depths, self.num_quantizers)
        return kept.to(z.device).view(-1, *[1] * (z.ndim - 1))

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

    @torch.compiler.disable
    @torch.no_grad()
    def _learn(self, vectors: Tensor, codes: Tensor, sums: list[Tensor]) -> None:
        """Move the codebooks of the levels searched: vectors (M, C), codes (M, l), sums of the levels up to each."""
        self._ensure_state()
        batch = _JointBatch(vectors)
        residuals = [vectors] + [vectors - total.view_as(vectors) for total in sums]
        peaks = batch.largest(torch.stack([residual.abs().amax() for residual in residuals[:-1]]))
        if all(map(math.isfinite, peaks)):  # else the loss is NaN or infinite and stops the run
            for level, peak in enumerate(peaks):
                self._learn_level(level, residuals[level], residuals[level + 1], codes[:, level], peak, batch)
        self._steps += 1

    def _learn_level(
        self, level: int, vectors: Tensor, left: Tensor, chosen: Tensor, peak: float, batch: "_JointBatch"
    ) -> None:
        codebook, counts = self.codebooks[level], self._counts[level]
        # Sums in whole units are the same in whatever order they are made: over ranks, and by atomic additions.
        unit = 2.0 ** (math.frexp(peak)[1] - 40)
        terms = F.pad(vectors.double().mul_(1 / unit).round_().long(), (0, 1), value=1)
        totals = terms.new_zeros(self.codebook_size, terms.shape[1]).index_add_(0, chosen, terms)
        batch.add_up(totals)
        occurrences = totals[:, -1]
        counts.lerp_(occurrences.to(counts.dtype), 1 - self.ema_decay)
        if self._steps >= self.warmup_steps:
            # EMA of sums over EMA of counts, written for the code itself: the sums need not be kept, a code that did
            # not occur stays where it is, and what warm-up has done to the counts alone shifts no code.
            used = occurrences.nonzero()[:, 0]
            old = codebook[used].double()
            pull = totals[used, :-1] * unit - occurrences[used, None] * old
            codebook[used] = (old + (1 - self.ema_decay) * pull / counts[used, None]).float()
        # A code that this batch used is alive, whatever its average says.
        dead = ((counts < self.restart_threshold) & (occurrences == 0)).nonzero()[:, 0]
        if dead.numel():
            weights = left.double().square().sum(dim=1) + 1e-12 if self.restart_by_error else None
            codebook[dead] = batch.draw(vectors, dead.numel(), weights)
            counts[dead] = 1.0

    def learning_state(self) -> dict[str, Tensor]:
        """What a resumed run needs beside the codebooks: EMA counts (L, K) and the number of steps."""
        self._ensure_state()
        return {"counts": self._counts, "steps": torch.tensor(self._steps)}

    def load_learning_state(self, state: dict[str, Tensor]) -> None:
        """Restore what `learning_state` gave.

        Raises:
            UserError: the counts are those of other codebooks.
        """
        if state["counts"].shape != self.codebooks.shape[:2]:
            raise UserError(
                f"the learning state is of codebooks {tuple(state['counts'].shape)} (levels, codes), "
                f"these are {tuple(self.codebooks.shape[:2])}"
            )
        self._counts = state["counts"].to(self.codebooks.device).clone()
        self._steps = int(state["steps"])

    @torch.no_grad()
    def init_from(self, latents: Tensor, num_iterations: int = 10) -> None:
        """Set every codebook by k-means on the residuals of sample latents (M, C), level after level.

        With several processes each must be given the same latents and the same random numbers.
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
    """The batches of all processes, one after another by rank; where there is one process, its batch."""

    def __init__(self, vectors: Tensor) -> None:
        self.shared = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        seed = torch.randint(2**62, (1,))
        self.sizes, self.rank = [vectors.shape[0]], 0
        if self.shared:
            self.rank = dist.get_rank()
            own = torch.tensor(self.sizes, device=vectors.device)
            gathered = [torch.empty_like(own) for _ in range(dist.get_world_size())]
            dist.all_gather(gathered, own)
            self.sizes = torch.cat(gathered).tolist()
            seed = seed.to(vectors.device)
            dist.broadcast(seed, src=0)
        self._generator = torch.Generator().manual_seed(int(seed))

    def largest(self, values: Tensor) -> list[float]:
        """Elementwise maximum over the processes; NaN counts as infinite."""
        values = values.nan_to_num(nan=torch.inf, posinf=torch.inf)
        if self.shared:
            dist.all_reduce(values, dist.ReduceOp.MAX)
        return values.tolist()

    def add_up(self, values: Tensor) -> None:
        """Sum over the processes, in place."""
        if self.shared:
            dist.all_reduce(values)

    def draw(self, vectors: Tensor, count: int, weights: Tensor | None) -> Tensor:
        """`count` of the joint vectors (count, C), uniform or in proportion to the weights (M,) of this rank's."""
        # Sorted uniform numbers, in the joint order: copies of one vector become neighbours in the codebook, where the
        # search settles ties cheaply.
        steps = torch.empty(count + 1, dtype=torch.float64).exponential_(generator=self._generator).cumsum(0)
        places = (steps[:-1] / steps[-1]).to(vectors.device)
        total = sum(self.sizes)
        if weights is None:
            index = (places * total).long()
        else:
            shares = self._all(weights).cumsum(0)
            index = torch.searchsorted(shares, places * shares[-1], right=True)
        index.clamp_(max=total - 1)
        if not self.shared:
            return vectors[index]
        own = index - sum(self.sizes[: self.rank])
        mine = (own >= 0) & (own < vectors.shape[0])
        drawn = vectors.new_zeros(count, vectors.shape[1])
        drawn[mine] = vectors[own[mine]]
        self.add_up(drawn)  # each from the one rank that has it, nothing from the others
        return drawn

    def _all(self, values: Tensor) -> Tensor:
        """Values of every rank's vectors, (M,) -> (M of all ranks,)."""
        if not self.shared:
            return values
        padded = F.pad(values, (0, max(self.sizes) - values.shape[0]))
        gathered = [torch.empty_like(padded) for _ in self.sizes]
        dist.all_gather(gathered, padded)
        return torch.cat([part[:size] for part, size in zip(gathered, self.sizes, strict=True)])
