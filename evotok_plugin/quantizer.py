"""Residual vector quantization with codebooks that learn by exponential moving averages.

M vectors (any leading shape), L levels, K codes per level, C dimensions.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evotok_plugin.code_search import nearest_codes
from evotok_plugin.common.processes import Processes
from evotok_plugin.errors import UserError
from evotok_plugin.quantizers.base import Quantizer


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


class ResidualVectorQuantizer(Quantizer):
    """Residual vector quantizer: each level picks the code nearest to the residual that earlier levels leave.

    In training mode every call also updates the codebooks (van den Oord et al. 2017, appendix A.1) by exponential
    moving averages of how often each code is chosen and of the vectors that choose it. A code whose average count falls
    below `restart_threshold`, and that the batch does not use, is restarted at a random vector of the batch. During the
    first `warmup_steps` calls codes are only restarted, not averaged. With `restart_by_error` restarts prefer vectors
    far from their code, so that codes do not crowd in plain image regions. With several processes, each process gets
    codebooks that are bit-identical to those of a single process on the joint batch: the batches concatenated in rank
    order, with the random numbers of rank 0.

    For `level_dropout`, `gradient` and `is_fixed` see `Quantizer`.

    Raises:
        UserError: `level_dropout` is not between 0 and 1, or the gradient is unknown.
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
        gradient: str = "straight_through",
    ) -> None:
        super().__init__(num_quantizers, codebook_size, codebook_dim, level_dropout, gradient)
        self.ema_decay, self.restart_threshold, self.warmup_steps = ema_decay, restart_threshold, warmup_steps
        self.restart_by_error = restart_by_error
        # Always float32, whatever the default dtype: rounded codebooks would give other codes.
        codebooks = torch.randn(num_quantizers, codebook_size, codebook_dim, dtype=torch.float32)
        self.register_buffer("codebooks", codebooks)
        # Learning state is not part of the model: it is created when training starts, and the trainer saves it.
        self._counts: Tensor | None = None
        self._steps = 0

    def reset_parameters(self) -> None:
        """Draw normal codebooks."""
        nn.init.normal_(self.codebooks)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantizer:
        super()._apply(fn, recurse)
        if self._counts is not None:
            self._counts = self._counts.to(self.codebooks.device)
        return self

    # Learning ------------------------------------------------------------------------------------------------

    def _ensure_counts(self) -> Tensor:
        if self._counts is None:
            self._counts = torch.ones(self.codebooks.shape[:2], device=self.codebooks.device)
        return self._counts

    @torch.compiler.disable
    @torch.no_grad()
    def _learn(self, vectors: Tensor, codes: Tensor, sums: list[Tensor]) -> None:
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
