"""Choosing codes from logits.

One uniform number decides a draw (by the inverse of the cumulative distribution), so that a table of them, made from an
image's seed before anything is drawn, fixes the whole image: nothing depends on what is drawn beside it, and a GPU
never waits for a random generator of the CPU.

R rows, K codes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from evotok_plugin.errors import UserError

_FIRST_CANDIDATES = 1024  # of a top-p choice on a CPU, where sorting 32768 codes costs more than the step's products


@dataclass(frozen=True)
class SamplingOptions:
    """How a code is chosen from its logits. Every value is one number, or one a level.

    Attributes:
        temperature: divides the logits, 0.001 to 1000; 0 takes the most likely code.
        top_k: that many of the most likely codes; 0 is all.
        top_p: of them the most likely ones that together reach this share of the probability; 1 is all.
        min_p: of them those at least this many times as likely as the likeliest one; 0 is all.
    """

    temperature: float | Sequence[float] = 1.0
    top_k: int | Sequence[int] = 0
    top_p: float | Sequence[float] = 1.0
    min_p: float | Sequence[float] = 0.0

    def __post_init__(self) -> None:
        for name, (fits, wanted) in _LIMITS.items():
            value = getattr(self, name)
            values = tuple(value) if isinstance(value, Sequence) else (value,)
            if not values or not all(isinstance(one, Real) and math.isfinite(one) and fits(one) for one in values):
                raise UserError(f"expected {wanted}, got {name}={value!r}")
            if isinstance(value, Sequence):
                object.__setattr__(self, name, values)

    def at_level(self, level: int) -> "SamplingOptions":
        """The options of one level, each of them one number."""
        return SamplingOptions(*(v[level] if isinstance(v, tuple) else v for v in vars(self).values()))

    def check_levels(self, num_levels: int) -> None:
        """Raises:
        UserError: an option with values for another number of levels.
        """
        for name, value in vars(self).items():
            if isinstance(value, tuple) and len(value) != num_levels:
                raise UserError(f"{name} has {len(value)} values, but {num_levels} levels are drawn")


_LIMITS = {
    "temperature": (lambda t: t == 0 or 1e-3 <= t <= 1e3, "temperature 0, or 0.001 to 1000"),
    "top_k": (lambda k: k >= 0 and int(k) == k, "a whole top_k >= 0"),
    "top_p": (lambda p: 0 < p <= 1, "0 < top_p <= 1"),
    "min_p": (lambda p: 0 <= p <= 1, "0 <= min_p <= 1"),
}


def uniform_noise(seed: int, *shape: int) -> Tensor:
    """Numbers in [0, 1) that follow from the seed alone, on whatever device they are used: float32, on the CPU."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def sample(logits: Tensor, options: SamplingOptions, noise: Tensor) -> Tensor:
    """Draw one code a row: logits (R, K), noise (R,) in [0, 1) -> (R,).

    `options` are of one level.
    """
    if options.temperature == 0:
        return logits.argmax(dim=-1)
    logits, top_k = logits.float(), int(options.top_k)
    if options.temperature != 1:
        logits = logits / options.temperature
    index = None
    if 0 < top_k < logits.shape[-1]:
        logits, index = logits.topk(top_k, dim=-1)
    probabilities = logits.softmax(dim=-1)
    if options.top_p < 1:
        if index is None:
            probabilities, index = _likeliest(probabilities, options.top_p)
        # The most likely codes whose mass before them is still below top_p.
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities * (before < options.top_p)
    if options.min_p > 0:
        likeliest = probabilities.amax(dim=-1, keepdim=True)
        probabilities = probabilities * (probabilities >= options.min_p * likeliest)
    chosen = _at_quantile(probabilities, noise)
    return chosen if index is None else index.gather(-1, chosen[:, None])[:, 0]


def _likeliest(probabilities: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Probabilities from the highest down, and whose they are, at least as many as reach `top_p`."""
    size = probabilities.shape[-1]
    count = min(_FIRST_CANDIDATES, size) if probabilities.device.type == "cpu" else size
    while True:
        values, index = probabilities.topk(count, dim=-1)
        if count == size or bool((values.sum(dim=-1) >= top_p).all()):
            return values, index
        count = min(size, 4 * count)


def _at_quantile(probabilities: Tensor, noise: Tensor) -> Tensor:
    """Where the running sum of each row (R, k), which need not end at 1, passes the share `noise` (R,) of its end."""
    sums = probabilities.cumsum(dim=-1)
    end = sums[:, -1:]
    wanted = noise.to(sums.device)[:, None] * end
    # Rounding may bring the product to the end itself, behind which nothing stands.
    wanted = torch.minimum(wanted, torch.nextafter(end, torch.full_like(end, -math.inf)))
    # No place is beyond the last, whatever the numbers are: on a GPU such an index would end the whole process.
    return torch.searchsorted(sums, wanted, right=True)[:, 0].clamp(max=sums.shape[-1] - 1)
