"""Successive halving: all candidates on few images, the better half on twice as many, until few are left."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from llava_ext.tuning.candidates import CURRENT, Candidate
from llava_ext.tuning.scores import Result

_FINALISTS = 4  # at most, on all images


@dataclass(frozen=True)
class Round:
    """A round of a search.

    Attributes:
        num_candidates: how many take part.
        num_images: images per candidate, those of the rounds before included.
    """

    num_candidates: int
    num_images: int


@dataclass(frozen=True)
class Outcome:
    """The end of a search.

    Attributes:
        best: see `choose`.
        finalists: their results on all images, best first.
        dropped: the last results of the other candidates, those with the most images first.
    """

    best: Result
    finalists: list[Result]
    dropped: list[Result]


def plan_rounds(num_candidates: int, num_images: int, least: int) -> list[Round]:
    """The rounds of a search; the last one has at most four candidates and all images.

    Args:
        least: images of the first round, at least.
    """
    counts = [num_candidates]
    while counts[-1] > _FINALISTS:
        counts.append(-(-counts[-1] // 2))
    last = len(counts) - 1
    return [
        Round(count, min(num_images, max(least, -(-num_images // 2 ** (last - place)))))
        for place, count in enumerate(counts)
    ]


def count_images(rounds: Iterable[Round]) -> int:
    """The number of images that a search draws."""
    total = before = 0
    for one in rounds:
        total += one.num_candidates * (one.num_images - before)
        before = one.num_images
    return total


def search(
    candidates: Sequence[Candidate], rounds: Sequence[Round], evaluate: Callable[[Candidate, int], Result]
) -> Outcome:
    """Find the best candidate.

    The current settings and the best candidate without guidance reach the last round.

    Args:
        candidates: the current settings first (`CURRENT`).
        rounds: from `plan_rounds`.
        evaluate: `Evaluator.evaluate`.
    """
    left, dropped = list(candidates), list[Result]()
    for place, one in enumerate(rounds):
        results = sorted((evaluate(candidate, one.num_images) for candidate in left), key=_score, reverse=True)
        if place + 1 < len(rounds):
            kept = _kept(results, rounds[place + 1].num_candidates)
            dropped = [result for result in results if result not in kept] + dropped
            left = [result.candidate for result in kept]
    return Outcome(choose(results), results, dropped)


def _score(result: Result) -> float:
    return result.overall


def _kept(results: Sequence[Result], count: int) -> list[Result]:
    """The results that stay, best first: the two that always do, and the best of the others.

    Args:
        results: best first.
    """
    unguided = [result for result in results if not result.candidate.cost]
    always = [result for result in results if result.candidate.name == CURRENT or result in unguided[:1]]
    others = [result for result in results if result not in always]
    return sorted(always + others[: count - len(always)], key=_score, reverse=True)


def choose(results: Sequence[Result]) -> Result:
    """The best result; ties within its standard error go to the one that costs least, then to the better one.

    Args:
        results: with at least two images of every skill.
    """
    best = max(results, key=_score)
    ties = [result for result in results if result.overall >= best.overall - best.standard_error]
    return min(ties, key=lambda result: (result.candidate.cost, -result.overall))
