"""Questions about scenes with their answers, open-ended or multiple choice in MMBench's format."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evotok_plugin.scenes.captions import NUMBERS, plural, with_article
from evotok_plugin.scenes.scene import (
    CELL_NAMES,
    COLORS,
    RELATIONS,
    SHAPES,
    SKILLS,
    Scene,
    relation,
    render,
    sample_scene,
)

OPTION_LETTERS = "ABCD"
MULTIPLE_CHOICE_PROMPT = "Answer with one of the options."


@dataclass(frozen=True)
class Question:
    """A question about a scene with its correct answer and plausible wrong ones."""

    category: str
    text: str
    answer: str
    distractors: tuple[str, ...]


L2_CATEGORY = {
    "color": "attribute_recognition",
    "shape": "attribute_recognition",
    "counting": "object_counting",
    "location": "object_localization",
    "relation": "spatial_relationship",
    "existence": "object_existence",
}


def _unique(values: Sequence[str]) -> list[str]:
    """Values that occur exactly once."""
    return [value for value, times in Counter(values).items() if times == 1]


def _color_question(scene: Scene, rng: np.random.Generator) -> Question | None:
    shapes = _unique([item.shape for item in scene.objects])
    if not shapes:
        return None
    shape = str(rng.choice(shapes))
    answer = next(item.color for item in scene.objects if item.shape == shape)
    return Question("color", f"What color is the {shape}?", answer, tuple(c for c in COLORS if c != answer))


def _shape_question(scene: Scene, rng: np.random.Generator) -> Question | None:
    colors = _unique([item.color for item in scene.objects])
    if not colors:
        return None
    color = str(rng.choice(colors))
    answer = next(item.shape for item in scene.objects if item.color == color)
    return Question("shape", f"What shape is the {color} object?", answer, tuple(s for s in SHAPES if s != answer))


def _counting_question(scene: Scene, rng: np.random.Generator) -> Question | None:
    shape = str(rng.choice([item.shape for item in scene.objects]))
    if rng.random() < 0.5:
        text, count = "How many objects are there?", len(scene.objects)
    else:
        text, count = f"How many {plural(shape)} are there?", sum(item.shape == shape for item in scene.objects)
    return Question("counting", text, NUMBERS[count], tuple(n for n in NUMBERS[1:] if n != NUMBERS[count]))


def _location_question(scene: Scene, rng: np.random.Generator) -> Question | None:
    kinds = _unique([item.kind for item in scene.objects])
    if not kinds:
        return None
    kind = str(rng.choice(kinds))
    answer = CELL_NAMES[next(item.cell for item in scene.objects if item.kind == kind)]
    return Question("location", f"Where is the {kind}?", answer, tuple(n for n in CELL_NAMES if n != answer))


def _relation_question(scene: Scene, rng: np.random.Generator) -> Question | None:
    items = scene.objects
    if len(items) > 2:  # the two are named by their shapes
        items = tuple(item for item in items if item.shape in _unique([other.shape for other in items]))
    if len(items) < 2:
        return None
    first, second = (items[i] for i in rng.permutation(len(items))[:2])
    answer = relation(first, second)
    if answer is None or first.shape == second.shape:
        return None
    text = f"Where is the {first.shape} relative to the {second.shape}?"
    return Question("relation", text, answer, tuple(r for r in RELATIONS if r != answer))


def _existence_question(scene: Scene, rng: np.random.Generator) -> Question | None:
    present = {item.kind for item in scene.objects}
    if rng.random() < 0.5:
        return Question("existence", f"Is there {with_article(str(rng.choice(sorted(present))))}?", "yes", ("no",))
    item = scene.objects[int(rng.integers(len(scene.objects)))]
    # Absent objects that share their shape or color with a present one make the question nontrivial.
    near = [f"{color} {item.shape}" for color in COLORS] + [f"{item.color} {shape}" for shape in SHAPES]
    absent = sorted(set(near) - present)
    return Question("existence", f"Is there {with_article(str(rng.choice(absent)))}?", "no", ("yes",))


_QUESTIONS: dict[str, Callable[[Scene, np.random.Generator], Question | None]] = {
    "color": _color_question,
    "shape": _shape_question,
    "counting": _counting_question,
    "location": _location_question,
    "relation": _relation_question,
    "existence": _existence_question,
}
# Shares of the categories in the benchmark, and in training, where the kinds that are hard to learn occur more often.
BENCHMARK_SHARES = {
    "color": 0.26, "shape": 0.22, "counting": 0.18, "location": 0.13, "relation": 0.13, "existence": 0.08,
}  # fmt: skip
TRAINING_SHARES = {
    "color": 0.17, "shape": 0.14, "counting": 0.13, "location": 0.2, "relation": 0.22, "existence": 0.14,
}  # fmt: skip


def sample_question(scene: Scene, rng: np.random.Generator, shares: Mapping[str, float] = BENCHMARK_SHARES) -> Question:
    """Sample a question that the scene answers.

    Args:
        shares: relative frequencies of the categories; one that does not fit the scene is drawn again.
    """
    names, weights = list(_QUESTIONS), np.array([shares[name] for name in _QUESTIONS])
    while True:
        question = _QUESTIONS[str(rng.choice(names, p=weights / weights.sum()))](scene, rng)
        if question is not None:
            return question


def sample_relation_question(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Sample a question of the category "relation", or none if the scene has no two objects that it could ask about."""
    return _relation_question(scene, rng)


def options(question: Question, rng: np.random.Generator) -> tuple[list[str], str]:
    """Up to four options in random order, and the letter of the correct one."""
    wrong = rng.permutation(question.distractors)[: len(OPTION_LETTERS) - 1].tolist()
    choices = [str(choice) for choice in rng.permutation([question.answer, *wrong])]
    return choices, OPTION_LETTERS[choices.index(question.answer)]


def multiple_choice(text: str, choices: Sequence[str]) -> str:
    """Format a question as in MMBench: question, lettered options, instruction to choose one of them."""
    lines = [f"{letter}. {choice}" for letter, choice in zip(OPTION_LETTERS, choices, strict=False)]
    return "\n".join([text, *lines, MULTIPLE_CHOICE_PROMPT])


def mmbench_rows(count: int, rng: np.random.Generator, image_size: int = 48) -> list[dict]:
    """Sample `count` questions with MMBench's columns; missing options are the string "nan", as in MMBench."""
    rows = []
    for index in range(count):
        scene = sample_scene(rng, SKILLS[index % len(SKILLS)])
        question = sample_question(scene, rng)
        choices, letter = options(question, rng)
        padded = [*choices, *["nan"] * (len(OPTION_LETTERS) - len(choices))]
        rows.append(
            {
                "index": index,
                "question": question.text,
                "hint": "nan",
                **dict(zip(OPTION_LETTERS, padded, strict=True)),
                "answer": letter,
                "category": question.category,
                "L2-category": L2_CATEGORY[question.category],
                "image": render(scene, image_size),
                "source": "scenes",
                "split": "val",
            }
        )
    return rows
