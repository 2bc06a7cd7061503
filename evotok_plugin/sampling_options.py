"""The options of sampling codes, without the libraries of sampling itself, so that flags are parsed quickly."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

from evotok_plugin.errors import UserError


@dataclass(frozen=True)
class SamplingOptions:
    """Options for choosing a code from its logits; every value is one number, or one number per level.

    Attributes:
        temperature: divisor of the logits, 0.001 to 1000; 0 takes the most likely code.
        top_k: keep the k most likely codes; 0 keeps all.
        top_p: of these, keep the most likely codes whose probabilities reach this sum; 1 keeps all.
        min_p: of these, keep codes whose probability is at least this fraction of the highest one; 0 keeps all.

    Raises:
        UserError: a value is out of range.
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
        """Return the options of one level, each a single number."""
        if not any(isinstance(value, tuple) for value in vars(self).values()):
            return self
        return SamplingOptions(*(v[level] if isinstance(v, tuple) else v for v in vars(self).values()))

    def check_levels(self, num_levels: int) -> None:
        """Check that options with one value per level have `num_levels` of them.

        Raises:
            UserError: an option has another number of values.
        """
        for name, value in vars(self).items():
            if isinstance(value, tuple) and len(value) != num_levels:
                raise UserError(
                    f"{name} has {len(value)} values, but {num_levels} levels are drawn; give one per level"
                )


_LIMITS = {
    "temperature": (lambda t: t == 0 or 1e-3 <= t <= 1e3, "temperature 0, or 0.001 to 1000"),
    "top_k": (lambda k: k >= 0 and int(k) == k, "a whole top_k >= 0"),
    "top_p": (lambda p: 0 < p <= 1, "0 < top_p <= 1"),
    "min_p": (lambda p: 0 <= p <= 1, "0 <= min_p <= 1"),
}
