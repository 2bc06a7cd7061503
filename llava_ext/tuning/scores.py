"""The images of a search, and statistics of their scores by skill."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from statistics import mean, variance

from llava_ext.data.prompt_files import Prompt
from llava_ext.tuning.candidates import Candidate


@dataclass(frozen=True)
class Job:
    """An image that every candidate draws."""

    prompt: Prompt
    seed: int


def make_jobs(prompts: Sequence[Prompt], num_images: int, seed: int) -> list[Job]:
    """The images of a search: the first image of every prompt, then the second, ..., with skills alternating.

    Any first part covers the skills evenly, and a larger `num_images` only adds images.

    Args:
        num_images: images per prompt.
        seed: of the first image; each further image adds 1.
    """
    by_skill: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_skill.setdefault(prompt.tag, []).append(prompt)
    alternating = [prompt for turn in zip_longest(*by_skill.values()) for prompt in turn if prompt is not None]
    return [Job(prompt, seed + place) for place, prompt in enumerate(alternating * num_images)]


@dataclass(frozen=True)
class Result:
    """A candidate's scores.

    Attributes:
        tags, scores: skill and score of every image that was drawn.
    """

    candidate: Candidate
    tags: tuple[str, ...]
    scores: tuple[float, ...]

    @cached_property
    def _by_skill(self) -> dict[str, list[float]]:
        groups: dict[str, list[float]] = {}
        for tag, score in zip(self.tags, self.scores, strict=True):
            groups.setdefault(tag, []).append(score)
        return groups

    @property
    def skills(self) -> dict[str, float]:
        """Mean score by skill."""
        return {tag: mean(scores) for tag, scores in self._by_skill.items()}

    @property
    def overall(self) -> float:
        """Mean over skills of the mean score."""
        return mean(self.skills.values())

    @property
    def standard_error(self) -> float:
        """Standard error of `overall` over images; NaN if a skill has a single image."""
        groups = self._by_skill.values()
        if any(len(scores) < 2 for scores in groups):
            return math.nan
        return math.sqrt(sum(variance(scores) / len(scores) for scores in groups)) / len(groups)
