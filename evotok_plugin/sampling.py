"""Sampling of codes from logits.

Each draw is decided by one uniform number (inverse transform sampling). The numbers of an image are generated from its
seed in advance and determine the entire image: it does not depend on what else is drawn in the batch, and a GPU never
waits for the CPU's random generator.

R rows, K codes.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from evotok_plugin.sampling_options import SamplingOptions

__all__ = ["SamplingOptions", "sample", "uniform_noise"]

# First number of candidates for top-p on a CPU, where sorting 32768 codes takes longer than the step's matrix products.
_FIRST_CANDIDATES = 1024


def uniform_noise(seed: int, *shape: int) -> Tensor:
    """Uniform numbers in [0, 1), float32 on the CPU, so that they depend only on the seed and not on the device."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def sample(logits: Tensor, options: SamplingOptions, noise: Tensor) -> Tensor:
    """Draw one code per row: logits (R, K), noise (R,) in [0, 1) -> codes (R,).

    Args:
        options: of one level, see `SamplingOptions.at_level`.
    """
    temperature, top_p, min_p = _number(options.temperature), _number(options.top_p), _number(options.min_p)
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits, top_k = logits.float(), int(_number(options.top_k))
    if temperature != 1:
        logits = logits / temperature
    index = None
    if 0 < top_k < logits.shape[-1]:
        logits, index = logits.topk(top_k, dim=-1)
    probabilities = logits.softmax(dim=-1)
    if top_p < 1:
        if index is None:
            probabilities, index = _likeliest(probabilities, top_p)
        # Keep the most likely codes as long as the total probability of the codes before them is below top_p.
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities * (before < top_p)
    if min_p > 0:
        likeliest = probabilities.amax(dim=-1, keepdim=True)
        probabilities = probabilities * (probabilities >= min_p * likeliest)
    chosen = _at_quantile(probabilities, noise)
    return chosen if index is None else index.gather(-1, chosen[:, None])[:, 0]


def _number(value: float | Sequence[float]) -> float:
    if isinstance(value, Sequence):
        raise TypeError(f"expected the options of one level, got {value!r}; call SamplingOptions.at_level first")
    return value


def _likeliest(probabilities: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Sorted probabilities, highest first, and their indices: at least as many as are needed to reach `top_p`."""
    size = probabilities.shape[-1]
    count = min(_FIRST_CANDIDATES, size) if probabilities.device.type == "cpu" else size
    while True:
        values, index = probabilities.topk(count, dim=-1)
        if count == size or bool((values.sum(dim=-1) >= top_p).all()):
            return values, index
        count = min(size, 4 * count)


def _at_quantile(probabilities: Tensor, noise: Tensor) -> Tensor:
    """First index (R,) at which the cumulative sum of a row (R, k) exceeds the fraction `noise` (R,) of its total.

    The rows need not sum to 1.
    """
    sums = probabilities.cumsum(dim=-1)
    end = sums[:, -1:]
    wanted = noise.to(sums.device)[:, None] * end
    # Rounding may give the total itself, which no cumulative sum exceeds.
    wanted = torch.minimum(wanted, torch.nextafter(end, torch.full_like(end, -math.inf)))
    # NaN and infinite sums must not give an index out of range: on a GPU it would abort the process.
    return torch.searchsorted(sums, wanted, right=True)[:, 0].clamp(max=sums.shape[-1] - 1)
