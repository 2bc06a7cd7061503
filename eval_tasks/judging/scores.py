"""Judgements of images, and scores with confidence intervals.

I judgements, P prompts, R resamples.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from evotok_plugin.errors import UserError

OVERALL = "overall"
_RESAMPLES, _SEED = 2000, 0


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """The judgement of one image.

    Attributes:
        index: number of the prompt.
        sample: number of the image among those of its prompt.
        image: path relative to the run's folder.
        score: in [0, 1].
        marks: values in [0, 1] that count for each skill; any number of them.
        correct: the verdict; None for judges that only give scores.
        reason: why the image is not correct; empty if it is.
        details: the judge's observations.
    """

    index: int
    sample: int
    image: str
    prompt: str
    score: float
    marks: dict[str, list[float]]
    correct: bool | None = None
    reason: str = ""
    details: dict = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Score:
    """A mean and its 95 % bootstrap interval over prompts; images of one prompt are not independent."""

    value: float
    low: float
    high: float
    num_marks: int
    num_prompts: int


def _share(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Sums divided by counts; NaN where the count is 0 (a resample without prompts of a skill)."""
    return np.divide(sums, counts, out=np.full_like(sums, np.nan, dtype=float), where=counts > 0)


def _resampled(strata: Sequence[str], rng: np.random.Generator) -> np.ndarray:
    """The number of times each prompt is drawn (R, P) when each stratum is resampled with replacement to its size."""
    weights = np.zeros((_RESAMPLES, len(strata)), dtype=np.int64)
    for stratum in dict.fromkeys(strata):
        members = np.flatnonzero(np.array(strata) == stratum)
        weights[:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), _RESAMPLES)
    return weights


def summarize(judgements: Iterable[Judgement], overall: Literal["skills", "images"]) -> dict[str, Score]:
    """Compute the overall score and the score of each skill.

    Args:
        overall: "skills" for the mean over skills, with the prompts of each skill resampled separately (GenEval);
            "images" for the mean over images.

    Raises:
        UserError: no judgements.
    """
    judgements = list(judgements)
    if not judgements:
        raise UserError("no image was judged, so the score is undefined; was the run limited to 0 documents?")
    prompts = list(dict.fromkeys(item.index for item in judgements))
    row = {index: number for number, index in enumerate(prompts)}
    skills = list(dict.fromkeys(skill for item in judgements for skill in item.marks))
    columns = {skill: number for number, skill in enumerate([*skills, OVERALL])}
    sums, counts = np.zeros((2, len(prompts), len(columns)))
    strata = [""] * len(prompts)
    for item in judgements:
        for skill, marks in [*item.marks.items(), (OVERALL, [item.score])]:
            sums[row[item.index], columns[skill]] += sum(marks)
            counts[row[item.index], columns[skill]] += len(marks)
        if overall == "skills":
            strata[row[item.index]] = next(iter(item.marks))
    weights = _resampled(strata, np.random.default_rng(_SEED))
    values = _share(sums.sum(axis=0), counts.sum(axis=0))  # (skills + 1,)
    samples = _share(weights @ sums, weights @ counts)  # (R, skills + 1)
    if overall == "skills":
        values[-1], samples[:, -1] = values[:-1].mean(), samples[:, :-1].mean(axis=1)
    low, high = np.nanquantile(samples, [0.025, 0.975], axis=0)
    return {
        name: Score(
            value=float(values[column]),
            low=float(low[column]),
            high=float(high[column]),
            num_marks=int(counts[:, column].sum()),
            num_prompts=int((counts[:, column] > 0).sum()),
        )
        for name, column in sorted(columns.items(), key=lambda pair: pair[0] != OVERALL)
    }


class Stopwatch:
    """Adds up the seconds spent in its `with` blocks."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> "Stopwatch":
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._started
