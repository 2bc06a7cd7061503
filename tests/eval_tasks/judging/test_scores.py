"""Scores and their intervals."""

import numpy as np
import pytest

from eval_tasks.judging.scores import Judgement, summarize


def judged(index: int, marks: dict, score: float | None = None, sample: int = 0) -> Judgement:
    value = next(iter(marks.values()))[0] if score is None else score
    return Judgement(index=index, sample=sample, image="", prompt="", score=value, marks=marks)


def test_the_overall_score_is_the_mean_over_skills_or_over_images():
    judgements = [judged(n, {"a": [1.0]}) for n in range(9)] + [judged(9, {"b": [0.0]})]
    by_skill, by_image = summarize(judgements, "skills"), summarize(judgements, "images")
    assert by_skill["overall"].value == 0.5 and by_image["overall"].value == 0.9
    assert list(by_skill) == ["overall", "a", "b"]
    assert (by_skill["a"].num_prompts, by_skill["a"].num_marks) == (9, 9)


def test_images_with_several_marks_and_without_marks():
    scores = summarize([judged(0, {"a": [1.0, 0.0, 0.0]}, 0.25), judged(1, {}, 0.75)], "images")
    assert scores["a"].value == pytest.approx(1 / 3) and scores["overall"].value == 0.5
    assert scores["overall"].num_prompts == 2


def test_intervals_have_their_nominal_coverage():
    """Prompts of different difficulty, four images each: intervals over images alone would be far too narrow."""
    rng, inside, narrow = np.random.default_rng(0), 0, 0
    for _ in range(150):
        chances = rng.beta(0.4, 0.4, size=60)  # the mean is 0.5
        hits = rng.random((60, 4)) < chances[:, None]
        judgements = [
            judged(n, {"a": [float(hit)]}, sample=s) for n, row in enumerate(hits) for s, hit in enumerate(row)
        ]
        score = summarize(judgements, "skills")["overall"]
        inside += score.low <= 0.5 <= score.high
        half = 1.96 * hits.std() / np.sqrt(hits.size)
        narrow += abs(hits.mean() - 0.5) <= half
    assert 0.88 <= inside / 150 <= 1.0 and narrow / 150 < 0.85


def test_skills_are_resampled_separately():
    """Each skill keeps its number of prompts, so the interval of a skill with equal scores has no width."""
    judgements = [judged(n, {"easy": [1.0]}) for n in range(5)] + [
        judged(9 + n, {"hard": [float(n % 2)]}) for n in range(40)
    ]
    scores = summarize(judgements, "skills")
    assert scores["easy"].low == scores["easy"].high == 1.0
    assert scores["overall"].low == pytest.approx((1 + scores["hard"].low) / 2)


def test_intervals_are_reproducible_and_need_judgements():
    judgements = [judged(n, {"a": [float(n % 3 == 0)]}) for n in range(30)]
    assert summarize(judgements, "images") == summarize(judgements, "images")
    with pytest.raises(ValueError, match="no image was judged"):
        summarize([], "images")
