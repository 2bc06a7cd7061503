"""Random detections and records for GenEval's rules; the golden verdicts belong to exactly these."""

import numpy as np

from eval_tasks.judging.rules import Instance

CLASSES = ("cup", "dog", "car")
COLOR_NAMES = ("red", "blue")
RELATIONS = ("left of", "right of", "above", "below")
_TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
_SCORES = (0.1, 0.3, 0.31, 0.5, 0.9, 0.91, 0.99)


def make(label="cup", score=0.95, box=(0, 0, 10, 10), color=None) -> Instance:
    return Instance(label, score, box, np.ones((8, 8), bool), color)


def random_case(rng: np.random.Generator) -> tuple[list[Instance], dict]:
    """Random detections, and a record that they may match; some cases have more than 16 instances of a class."""
    instances = []
    crowd = 18 if rng.random() < 0.03 else 0
    for n in range(int(rng.integers(0, 7)) + crowd):
        x, y, width, height = (int(side) for side in rng.integers(0, 30, 4))
        # Steps of 1e-4 keep scores distinct, because the order of equal scores is undefined.
        score = _SCORES[rng.integers(len(_SCORES))] + n * 1e-4
        label = "cup" if crowd else CLASSES[rng.integers(3)]
        box = (float(x), float(y), float(x + width + 1), float(y + height + 1))
        instances.append(make(label, score, box, COLOR_NAMES[rng.integers(2)]))
    include = []
    for n in range(int(rng.integers(1, 4))):
        clause = {"class": CLASSES[rng.integers(3)], "count": int(rng.integers(1, 3))}
        if rng.random() < 0.3:
            clause["color"] = COLOR_NAMES[rng.integers(2)]
        if n and rng.random() < 0.6:
            clause["position"] = [RELATIONS[rng.integers(4)], int(rng.integers(n))]
        include.append(clause)
    record = {"tag": _TAGS[rng.integers(len(_TAGS))], "include": include}
    if rng.random() < 0.3:
        count = int(rng.integers(1, 4)) if rng.random() < 0.8 else int(rng.integers(14, 18))
        record["exclude"] = [{"class": CLASSES[rng.integers(3)], "count": count}]
    return instances, record
