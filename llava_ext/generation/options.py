"""How images are drawn."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral

from evotok_plugin.sampling import SamplingOptions

_LARGEST_SCALE = 1000  # far beyond what makes sense, and far from where numbers overflow
SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class DrawingOptions:
    """Guidance and sampling of drawn images.

    Attributes:
        guidance_scale: of classifier-free guidance; 1 draws from the prompt alone, at half the cost, more follows it
            more closely.
        guidance_schedule: "constant", or how the scale rises from 1 at the first position to `guidance_scale` at the
            last: "linear" or, slowly at both ends, "cosine".
        negative_prompt: what guidance leads away from; without it, from an image of nothing in particular.
        sampling: how codes are chosen.

    Raises:
        ValueError: a scale below 1 or beyond all measure, or no such schedule.
    """

    guidance_scale: float = 3.0
    guidance_schedule: str = "constant"
    negative_prompt: str = ""
    sampling: SamplingOptions = field(default_factory=SamplingOptions)

    def __post_init__(self) -> None:
        if not 1 <= self.guidance_scale <= _LARGEST_SCALE:
            raise ValueError(
                f"guidance_scale must be at least 1 and at most {_LARGEST_SCALE}, got {self.guidance_scale}; 1 draws "
                "from the prompt alone"
            )
        if self.guidance_schedule not in SCHEDULES:
            raise ValueError(f"guidance_schedule: expected {', '.join(SCHEDULES)}, got {self.guidance_schedule!r}")

    @property
    def guided(self) -> bool:
        """Whether images are drawn with the prompt and without it side by side."""
        return self.guidance_scale != 1

    def scale_at(self, step: int, num_steps: int) -> float:
        """The guidance scale of one of an image's steps, numbered from 0."""
        share = step / max(1, num_steps - 1)
        if self.guidance_schedule == "constant":
            return self.guidance_scale
        rise = share if self.guidance_schedule == "linear" else (1 - math.cos(math.pi * share)) / 2
        return 1 + (self.guidance_scale - 1) * rise


def seeds_for(seed: int | Sequence[int], count: int, what: str) -> list[int]:
    """One seed for each of `count` draws, which `what` explains: those given, or as many from one on.

    Raises:
        ValueError: another number of them, or one that no generator takes.
    """
    seeds = [int(seed) + i for i in range(count)] if isinstance(seed, Integral) else [int(s) for s in seed]
    if len(seeds) != count:
        raise ValueError(f"got {len(seeds)} seeds for {count} ({what})")
    if wrong := [s for s in seeds if not -(2**63) <= s < 2**63]:
        raise ValueError(f"a seed has at most 63 bits, got {wrong[0]}")
    return seeds
