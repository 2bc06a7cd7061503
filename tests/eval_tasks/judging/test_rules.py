"""GenEval's rules on manual cases, and on thousands of random cases against the original program's verdicts and a naive
implementation."""

import math
from pathlib import Path

import numpy as np
import pytest
from geneval_cases import CLASSES, make, random_case

from eval_tasks.judging.rules import (
    GENEVAL_RULES,
    Rules,
    colors_wanted,
    confident,
    directions,
    evaluate,
    overall_score,
    task_scores,
)

# Verdicts of evaluation/evaluate_images.py of github.com/djghosh13/geneval on `random_case`s, eight per byte.
GOLDEN = Path(__file__).with_name("geneval_verdicts.txt")
GOLDEN_SEED, GOLDEN_CASES = 2310, 8000


def judged(instances, include, exclude=(), tag="two_object", rules=GENEVAL_RULES):
    return evaluate({"tag": tag, "include": include, "exclude": exclude}, instances, rules)


# A naive implementation ------------------------------------------------------------------------------------------


def naive_direction(box, other, wanted) -> bool:
    x1, y1 = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    x2, y2 = (other[0] + other[2]) / 2, (other[1] + other[3]) / 2
    length = math.sqrt((x1 - x2) ** 2 + (y1 - y2) ** 2)
    if length == 0:
        return False

    def shrink(offset, sizes):
        smaller = abs(offset) - 0.1 * sizes
        return 0 if smaller < 0 else smaller if offset > 0 else -smaller

    x = shrink(x1 - x2, (box[2] - box[0]) + (other[2] - other[0])) / length
    y = shrink(y1 - y2, (box[3] - box[1]) + (other[3] - other[1])) / length
    return {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}[wanted]


def naive_verdict(instances, record) -> bool:
    threshold = 0.9 if record["tag"] == "counting" else 0.3
    kept = {}
    for label in CLASSES:
        good = [i for i in instances if i.label == label and i.score > threshold]
        good.sort(key=lambda i: i.score, reverse=True)
        kept[label] = good[:16]
    correct, targets = True, []
    for clause in record["include"]:
        ok = True
        taken = kept[clause["class"]][: clause["count"]]
        if len(taken) < clause["count"]:
            ok = False
        elif "color" in clause and sum(i.color == clause["color"] for i in taken) < clause["count"]:
            ok = False
        elif "position" in clause:
            wanted, number = clause["position"]
            if targets[number] is None:
                ok = False
            else:
                for one in taken:
                    for two in targets[number]:
                        if not naive_direction(one.box, two.box, wanted):
                            ok = False
        targets.append(taken if ok else None)
        correct = correct and ok
    for clause in record.get("exclude", ()):
        if len(kept[clause["class"]]) >= clause["count"]:
            correct = False
    return correct


def cases():
    rng = np.random.default_rng(GOLDEN_SEED)
    return [random_case(rng) for _ in range(GOLDEN_CASES)]


def test_verdicts_equal_those_of_the_original_program():
    golden = np.unpackbits(np.frombuffer(bytes.fromhex(GOLDEN.read_text()), np.uint8)).astype(bool)
    found = [evaluate(record, instances).correct for instances, record in cases()]
    assert found == golden.tolist() and 500 < golden.sum() < 7500  # both outcomes are covered


def test_random_cases_match_naive_implementation():
    for instances, record in cases():
        verdict = evaluate(record, instances)
        assert verdict.correct == naive_verdict(instances, record), (instances, record, verdict)
        assert verdict.correct == (verdict.reason == "")


def test_only_colors_that_affect_the_verdict_are_requested():
    """Colors of other instances do not change the verdict; requested instances belong to clauses with a color."""
    for instances, record in cases()[:2000]:
        wanted = colors_wanted(record, instances)
        repainted = [
            item if any(item is other for other in wanted) else make(item.label, item.score, item.box, "green")
            for item in instances
        ]
        assert evaluate(record, repainted).correct == evaluate(record, instances).correct
        assert {item.label for item in wanted} <= {clause["class"] for clause in record["include"] if "color" in clause}


# Single rules ----------------------------------------------------------------------------------------------------


def test_scores_must_exceed_the_threshold_and_counting_has_its_own():
    cup = [{"class": "cup", "count": 1}]
    assert not judged([make(score=0.3)], cup).correct
    assert judged([make(score=0.31)], cup).correct
    assert not judged([make(score=0.9)], cup, tag="counting").correct
    assert judged([make(score=0.91)], cup, tag="counting").correct
    assert judged([make(score=0.01)], cup, rules=Rules(min_score=0.0)).correct


def test_exclude_limits_the_count():
    include, exclude = [{"class": "cup", "count": 2}], [{"class": "cup", "count": 3}]
    for number, correct in ((1, False), (2, True), (3, False)):
        verdict = judged([make(score=0.95)] * number, include, exclude, tag="counting")
        assert verdict.correct is correct
    assert "expected cup < 3, found 3" in judged([make(score=0.95)] * 3, include, exclude, tag="counting").reason


def test_only_the_most_confident_instances_count():
    instances = [make(score=0.5, color="red"), make(score=0.9, color="blue")]
    assert judged(instances, [{"class": "cup", "count": 1, "color": "blue"}]).correct
    wrong = judged(instances, [{"class": "cup", "count": 1, "color": "red"}])
    assert wrong.reason == "expected red cup >= 1, found 0 (blue)"


def test_at_most_sixteen_instances_of_a_class():
    cups = [make(score=0.95)] * 20
    assert judged(cups, [{"class": "cup", "count": 16}], [{"class": "cup", "count": 17}]).correct
    assert not judged(cups, [{"class": "cup", "count": 17}]).correct
    assert len(confident(cups, "counting")["cup"]) == 16


def test_a_failed_clause_leaves_no_target():
    cup, dog = make("cup", box=(0, 0, 4, 4), color="red"), make("dog", box=(20, 0, 24, 4))
    include = [{"class": "cup", "count": 1, "color": "blue"}, {"class": "dog", "count": 1, "position": ["right of", 0]}]
    reason = judged([cup, dog], include).reason
    assert "expected blue cup" in reason and "no target" in reason


def test_directions():
    middle = (20.0, 20.0, 30.0, 30.0)
    assert directions((0, 20, 10, 30), middle) == {"left of"}
    assert directions((40, 20, 50, 30), middle) == {"right of"}
    assert directions((20, 0, 30, 10), middle) == {"above"}
    assert directions((20, 40, 30, 50), middle) == {"below"}
    assert directions((0, 0, 10, 10), middle) == {"left of", "above"}
    assert directions(middle, middle) == frozenset()
    # Offsets within a tenth of the summed sizes, or barely above it, have no direction.
    assert directions((22, 20, 32, 30), middle) == frozenset()
    assert directions((0.001, 0, 0.001, 0), (0, 0, 0, 0)) == {"right of"}
    assert directions((0.0009, 0, 0.0009, 0), (0, 0, 0, 0)) == frozenset()


def test_position_needs_an_earlier_clause():
    with pytest.raises(ValueError, match="refers to clause 1"):
        judged([make()], [{"class": "cup", "count": 1, "position": ["above", 1]}])


def test_overall_is_the_mean_of_task_scores_not_of_images():
    scored = [("a", 1.0)] * 9 + [("b", 0.0)]
    assert task_scores(scored) == {"a": 1.0, "b": 0.0}
    assert overall_score(scored) == 0.5
    with pytest.raises(ValueError, match="no image was judged"):
        overall_score([])
