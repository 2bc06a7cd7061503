"""Selection of drawn images: several candidates are drawn per image, scored, and the best one is kept.

R candidates drawn together, N positions, L levels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evotok_plugin.errors import UserError
from llava_ext.generation.model_interface import ModelInterface
from llava_ext.generation.reading_score import PromptReader
from llava_ext.processing_evotok_llava import EvoTokLlavaProcessor
from llava_ext.rewards import Reward, WeightedRewards

READING = "reading"  # what image files record as the judge where the model's own reading selects
_SCORE_DIGITS = 3
Scorer = Callable[[list[str], Tensor], list[float]]  # prompts and codes (R, N, L) to R scores


@dataclass(frozen=True)
class Candidate:
    """A drawing among which one is kept.

    Attributes:
        image: index of the image that it is a candidate for.
        number: its number among the candidates of that image, from 0.
        prompt, seed: of this candidate.
    """

    image: int
    number: int
    prompt: str
    seed: int


@dataclass(frozen=True)
class Choice:
    """The candidate that is kept, with its codes (N, L) and its score; None if it is the only one."""

    candidate: Candidate
    codes: Tensor
    score: float | None

    def record(self) -> dict[str, Any]:
        """The candidate and its score, as image files record them; empty without a selection."""
        if self.score is None:
            return {}
        # A rounded score does not depend on the batch, so that the same image replaces its file.
        chosen = {"candidate": self.candidate.number, "candidate_seed": self.candidate.seed}
        return {**chosen, "score": round(self.score, _SCORE_DIGITS)}


def candidate_seed(seed: int, number: int) -> int:
    """The seed of a candidate: the image's own seed for number 0; further ones are derived from both.

    Derived seeds are at least 2**62, so they never equal one of the consecutive seeds of further images.
    """
    if number == 0:
        return seed
    state = np.random.SeedSequence(seed % 2**64, spawn_key=(number,)).generate_state(1, np.uint64)
    return 2**62 + int(state[0]) % 2**62


def candidates_for(prompts: Sequence[str], seeds: Sequence[int], best_of: int) -> list[Candidate]:
    """The candidates of images, given by their prompts and seeds; those of one image together."""
    return [
        Candidate(image, number, prompt, candidate_seed(seed, number))
        for image, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        for number in range(best_of)
    ]


class Selector:
    """Keeps the best candidate of each image, while candidates arrive in order, in batches of any size.

    Candidates of an image with equal codes are scored once, so that their scores are equal.

    Args:
        best_of: candidates per image.
        score: None without a selection (`best_of=1`).
    """

    def __init__(self, best_of: int, score: Scorer | None) -> None:
        self._best_of, self._score = best_of, score
        self._scores: dict[tuple[int, bytes], float] = {}  # of the images that are not complete, by image and codes
        self._best: Choice | None = None  # among the candidates so far of the image that is not complete
        self._best_score = 0.0

    def add(self, candidates: Sequence[Candidate], codes: Tensor) -> list[Choice]:
        """Add candidates with their codes (R, N, L); returns the choices for the images that are now complete."""
        if self._score is None:
            return [Choice(one, own, None) for one, own in zip(candidates, codes, strict=True)]
        keys = [(one.image, own.tobytes()) for one, own in zip(candidates, codes.cpu().numpy(), strict=True)]
        new = [i for i, key in enumerate(keys) if key not in self._scores and key not in keys[:i]]
        scores = self._score([candidates[i].prompt for i in new], codes[new]) if new else []
        self._scores.update(zip((keys[i] for i in new), scores, strict=True))
        complete: list[Choice] = []
        for one, own, key in zip(candidates, codes, keys, strict=True):
            score = self._scores[key]
            if self._best is None or score > self._best_score:
                self._best, self._best_score = Choice(one, own, score), score
            if one.number == self._best_of - 1:
                complete.append(self._best)
                self._best = None
        unfinished = candidates[-1].image if self._best is not None else None
        self._scores = {key: score for key, score in self._scores.items() if key[0] == unfinished}
        return complete


def make_selector(
    model: ModelInterface, processor: EvoTokLlavaProcessor, best_of: int, judge: Reward | None
) -> Selector:
    """Create the selector of a call: candidates are scored by the judge, or by the model's own reading without one.

    Raises:
        UserError: a judge without candidates to choose from, or invalid settings of the model.
    """
    if best_of == 1:
        if judge is not None:
            raise UserError("a judge has no effect with best_of=1; set best_of to at least 2, or leave the judge out")
        return Selector(best_of, None)
    if judge is not None:
        return Selector(best_of, _judging(model, processor, judge))
    reader = PromptReader(model, processor)
    return Selector(best_of, lambda prompts, codes: reader.scores(prompts, codes).total.tolist())


def _judging(model: ModelInterface, processor: EvoTokLlavaProcessor, judge: Reward) -> Scorer:
    checked = WeightedRewards({"judge": judge}, {"judge": 1.0})  # checks the number of scores and their values

    @torch.no_grad()
    def score(prompts: list[str], codes: Tensor) -> list[float]:
        return checked(prompts, processor.image_processor.to_pil(model.vision_tower.decode_pixels(codes)))

    return score
