"""Several rewards with weights."""

import math
from collections.abc import Mapping, Sequence

from PIL.Image import Image

from evotok_plugin.errors import UserError
from llava_ext.rewards.protocol import Reward


class WeightedRewards:
    """The weighted sum of rewards, itself a reward.

    Args:
        rewards: by name.
        weights: finite numbers by the same names.
    """

    def __init__(self, rewards: Mapping[str, Reward], weights: Mapping[str, float]) -> None:
        self._rewards, self.weights = dict(rewards), dict(weights)

    @property
    def names(self) -> list[str]:
        """The names of the rewards, in order."""
        return list(self._rewards)

    def __call__(self, prompts: Sequence[str], images: Sequence[Image]) -> list[float]:
        """Score R images for R prompts by the weighted sum."""
        return self.total(self.scores(prompts, images))

    def scores(self, prompts: Sequence[str], images: Sequence[Image]) -> dict[str, list[float]]:
        """Score R images for R prompts by each reward: R numbers by name.

        Raises:
            UserError: a reward returns another number of scores, or one that is not a finite number.
        """
        return {name: _checked(name, reward(prompts, images), len(images)) for name, reward in self._rewards.items()}

    def total(self, scores: Mapping[str, Sequence[float]]) -> list[float]:
        """The weighted sum of scores by name, one number per image."""
        rows = zip(*(scores[name] for name in self._rewards), strict=True)
        return [sum(self.weights[name] * value for name, value in zip(self._rewards, row, strict=True)) for row in rows]


def _checked(name: str, scores: Sequence[float], num_images: int) -> list[float]:
    try:
        values = [float(score) for score in scores]
    except (TypeError, ValueError) as error:
        raise UserError(f"reward {name}: expected one number per image, got {scores!r:.200}") from error
    if len(values) != num_images:
        raise UserError(f"reward {name}: expected {num_images} scores, one per image, got {len(values)}")
    if not all(map(math.isfinite, values)):
        raise UserError(f"reward {name}: the score of image {[*map(math.isfinite, values)].index(False)} is not finite")
    return values
