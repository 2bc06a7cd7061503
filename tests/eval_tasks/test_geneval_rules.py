"""GenEval's rules against hand-made cases and, on thousands of random ones, against a naive second implementation."""

import math

import numpy as np
import pytest
from PIL import Image

from eval_tasks.geneval_judge import (
    GENEVAL_RULES,
    Instance,
    Rules,
    directions,
    evaluate_image,
    overall_score,
    task_scores,
)

IMAGE = Image.new("RGB", (8, 8))
CLASSES, COLOR_NAMES = ("cup", "dog", "car"), ("red", "blue")
RELATIONS = ("left of", "right of", "above", "below")


class NamedColors:
    """A judge whose instances already know their colour."""

    def colors(self, image, instances):
        return [instance.color for instance in instances]


def make(label="cup", score=0.95, box=(0, 0, 10, 10), color=None) -> Instance:
    return Instance(label, score, box, np.ones((8, 8), bool), color)


def judged(instances, include, exclude=(), tag="two_object", rules=GENEVAL_RULES):
    return evaluate_image(IMAGE, {"tag": tag, "include": include, "exclude": exclude}, instances, NamedColors(), rules)


# The second implementation: the rules told again, step by step ----------------------------------------------------


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
    for clause in record["exclude"]:
        if len(kept[clause["class"]]) >= clause["count"]:
            correct = False
    return correct


def random_case(rng):
    tag = str(rng.choice(["counting", "position", "color_attr"]))
    scores = np.array([0.1, 0.3, 0.31, 0.5, 0.9, 0.91, 0.99])
    instances = []
    for n in range(int(rng.integers(0, 7))):
        x, y, width, height = rng.integers(0, 30, 4)
        box = (float(x), float(y), float(x + width + 1), float(y + height + 1))
        # A tiny step keeps scores distinct: which of two equal ones is taken first is nobody's rule.
        score = float(rng.choice(scores)) + n * 1e-6
        instances.append(make(str(rng.choice(CLASSES)), score, box, str(rng.choice(COLOR_NAMES))))
    include = []
    for n in range(int(rng.integers(1, 4))):
        clause = {"class": str(rng.choice(CLASSES)), "count": int(rng.integers(1, 3))}
        if rng.random() < 0.3:
            clause["color"] = str(rng.choice(COLOR_NAMES))
        if n and rng.random() < 0.6:
            clause["position"] = [str(rng.choice(RELATIONS)), int(rng.integers(n))]
        include.append(clause)
    exclude = [{"class": str(rng.choice(CLASSES)), "count": int(rng.integers(1, 4))}] if rng.random() < 0.3 else []
    return instances, {"tag": tag, "include": include, "exclude": exclude}


def test_random_cases_match_naive_implementation():
    rng = np.random.default_rng(0)
    verdicts = []
    for _ in range(8000):
        instances, record = random_case(rng)
        verdict = evaluate_image(IMAGE, record, instances, NamedColors())
        assert verdict.correct == naive_verdict(instances, record), (instances, record, verdict)
        assert verdict.correct == (verdict.reason == "")
        verdicts.append(verdict.correct)
    assert 500 < sum(verdicts) < 7500  # both outcomes are covered


# Single rules ----------------------------------------------------------------------------------------------------


def test_scores_must_exceed_the_threshold_and_counting_has_its_own():
    cup = [{"class": "cup", "count": 1}]
    assert not judged([make(score=0.3)], cup).correct
    assert judged([make(score=0.31)], cup).correct
    assert not judged([make(score=0.9)], cup, tag="counting").correct
    assert judged([make(score=0.91)], cup, tag="counting").correct
    assert judged([make(score=0.01)], cup, rules=Rules(min_score=0.0)).correct


def test_exclude_counts_what_is_too_many():
    include, exclude = [{"class": "cup", "count": 2}], [{"class": "cup", "count": 3}]
    for number, correct in ((1, False), (2, True), (3, False)):
        verdict = judged([make(score=0.95)] * number, include, exclude, tag="counting")
        assert verdict.correct is correct
    assert "expected cup < 3, found 3" in judged([make(score=0.95)] * 3, include, exclude, tag="counting").reason


def test_only_the_most_confident_instances_are_looked_at():
    instances = [make(score=0.5, color="red"), make(score=0.9, color="blue")]
    assert judged(instances, [{"class": "cup", "count": 1, "color": "blue"}]).correct
    wrong = judged(instances, [{"class": "cup", "count": 1, "color": "red"}])
    assert wrong.reason == "expected red cup >= 1, found 0 (blue)"


def test_at_most_sixteen_instances_of_a_class():
    cups = [make(score=0.95)] * 20
    assert judged(cups, [{"class": "cup", "count": 16}], [{"class": "cup", "count": 17}]).correct
    assert not judged(cups, [{"class": "cup", "count": 17}]).correct


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
    # Offsets within a tenth of the summed sizes are none.
    assert directions((22, 20, 32, 30), middle) == frozenset()


def test_position_needs_an_earlier_clause():
    with pytest.raises(ValueError, match="refers to clause 1"):
        judged([make()], [{"class": "cup", "count": 1, "position": ["above", 1]}])


def test_overall_is_the_mean_of_task_scores_not_of_images():
    scored = [("a", 1.0)] * 9 + [("b", 0.0)]
    assert task_scores(scored) == {"a": 1.0, "b": 0.0}
    assert overall_score(scored) == 0.5
    with pytest.raises(ValueError, match="no image was judged"):
        overall_score([])
