"""GenEval's 553 prompts and their records, regenerated from the published seed.

Source: GenEval (arXiv 2310.11513; github.com/djghosh13/geneval, MIT license): class names, seed and order of the random
choices. The SHA-256 of the list is checked on every generation, so that another version of numpy cannot change it
unnoticed.
"""

import hashlib
import json
from collections.abc import Callable

import numpy as np

from eval_tasks.judging.vocabulary import CLASSES, COLORS
from evotok_plugin.errors import UserError

POSITIONS = ("left of", "right of", "above", "below")
NUMBERS = {2: "two", 3: "three", 4: "four"}
_PERSON = CLASSES.index("person")  # never has a color

SEED, DRAWS = 43, 100
_SHA256 = "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"


def article(name: str) -> str:
    """Prepend the indefinite article: "an apple"."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def plural(label: str) -> str:
    """Form the plural as GenEval does, without exceptions: "buses", "sheeps"."""
    return f"{label}{'es' if label.endswith('s') else 's'}"


def _colorable(index: int) -> str:
    """The class at an index in 1..79, which excludes person."""
    return CLASSES[(index + _PERSON) % len(CLASSES)]


def _two_object(rng: np.random.Generator) -> dict:
    first, second = (CLASSES[index] for index in rng.choice(len(CLASSES), size=2, replace=False))
    return {
        "tag": "two_object",
        "include": [{"class": first, "count": 1}, {"class": second, "count": 1}],
        "prompt": f"a photo of {article(first)} and {article(second)}",
    }


def _counting(rng: np.random.Generator) -> dict:
    label = CLASSES[rng.choice(len(CLASSES))]
    count = int(rng.integers(2, 4, endpoint=True))
    return {
        "tag": "counting",
        "include": [{"class": label, "count": count}],
        "exclude": [{"class": label, "count": count + 1}],
        "prompt": f"a photo of {NUMBERS[count]} {plural(label)}",
    }


def _colors(rng: np.random.Generator) -> dict:
    label = _colorable(rng.choice(len(CLASSES) - 1) + 1)
    color = COLORS[rng.choice(len(COLORS))]
    return {
        "tag": "colors",
        "include": [{"class": label, "count": 1, "color": color}],
        "prompt": f"a photo of {article(color)} {label}",
    }


def _position(rng: np.random.Generator) -> dict:
    first, second = (CLASSES[index] for index in rng.choice(len(CLASSES), size=2, replace=False))
    position = POSITIONS[rng.choice(len(POSITIONS))]
    return {
        "tag": "position",
        "include": [{"class": second, "count": 1}, {"class": first, "count": 1, "position": [position, 0]}],
        "prompt": f"a photo of {article(first)} {position} {article(second)}",
    }


def _color_attr(rng: np.random.Generator) -> dict:
    first, second = (_colorable(index) for index in rng.choice(len(CLASSES) - 1, size=2, replace=False) + 1)
    color, other = (COLORS[index] for index in rng.choice(len(COLORS), size=2, replace=False))
    return {
        "tag": "color_attr",
        "include": [{"class": first, "count": 1, "color": color}, {"class": second, "count": 1, "color": other}],
        "prompt": f"a photo of {article(color)} {first} and {article(other)} {second}",
    }


_DRAWN: tuple[Callable[[np.random.Generator], dict], ...] = (_two_object, _counting, _colors, _position, _color_attr)


def draw_records(seed: int, draws: int) -> list[dict]:
    """Every class once as a single object, then `draws` records of each other skill, without exact duplicates."""
    rng = np.random.default_rng(seed)
    records = [
        {"tag": "single_object", "include": [{"class": label, "count": 1}], "prompt": f"a photo of {article(label)}"}
        for label in (CLASSES[index] for index in rng.choice(len(CLASSES), size=len(CLASSES), replace=False))
    ]
    records += [draw(rng) for draw in _DRAWN for _ in range(draws)]
    return list({json.dumps(record): record for record in records}.values())


def geneval_records() -> list[dict]:
    """GenEval's 553 records (`tag`, `include`, `prompt`, and `exclude` for counting) in its order.

    Raises:
        UserError: the installed numpy generates other random numbers than the one that the list was made with.
    """
    records = draw_records(SEED, DRAWS)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    if hashlib.sha256(lines.encode()).hexdigest() != _SHA256:
        raise UserError(
            f"numpy {np.__version__} generates other prompts than GenEval's from seed {SEED}; install numpy 2.0 to 2.4"
        )
    return records
