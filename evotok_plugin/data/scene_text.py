"""What can be said about a scene: captions, GenEval prompts, questions with options, LLaVA records.

Everything is a function of a `Scene` and a random generator, so text and picture cannot disagree.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evotok_plugin.data.scenes import (
    CELL_NAMES,
    COLORS,
    RELATIONS,
    SHAPES,
    SKILLS,
    Scene,
    SceneObject,
    relation,
    render,
    sample_scene,
)

NUMBERS = ("zero", "one", "two", "three", "four")
OPTION_LETTERS = "ABCD"
MULTIPLE_CHOICE_PROMPT = "Answer with one of the options."
DESCRIBE_PROMPT = "Describe the image."


def with_article(noun: str) -> str:
    """Prefix the indefinite article: "an orange circle"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("s") else "s")


def _kind(item: SceneObject) -> str:
    return f"{item.color} {item.shape}"


# Captions and drawing prompts ----------------------------------------------------------------------------------


def description(scene: Scene) -> str:
    """All that can be seen, in reading order: "a red circle in the top left, a blue ring in the center"."""
    ordered = sorted(scene.objects, key=lambda item: item.cell)
    return ", ".join(f"{with_article(_kind(item))} in the {CELL_NAMES[item.cell]}" for item in ordered)


def prompt_record(scene: Scene, skill: str) -> dict:
    """The scene as a GenEval record: `tag`, `include`, (`exclude`), `prompt`; a true statement about the scene."""
    items = scene.objects
    first = items[0]
    if skill in ("single_object", "colors"):
        clause = {"class": first.shape, "count": 1}
        if skill == "colors":
            clause["color"] = first.color
        noun = _kind(first) if skill == "colors" else first.shape
        return {"tag": skill, "include": [clause], "prompt": f"a photo of {with_article(noun)}"}
    if skill == "counting":
        count = len(items)
        return {
            "tag": skill,
            "include": [{"class": first.shape, "count": count}],
            "exclude": [{"class": first.shape, "count": count + 1}],
            "prompt": f"a photo of {NUMBERS[count]} {plural(first.shape)}",
        }
    second = items[1]
    if skill == "position":
        how = relation(first, second)
        return {
            "tag": skill,
            "include": [
                {"class": second.shape, "count": 1},
                {"class": first.shape, "count": 1, "position": [how, 0]},
            ],
            "prompt": f"a photo of {with_article(first.shape)} {how} {with_article(second.shape)}",
        }
    colored = skill == "color_attr"
    clauses = [{"class": i.shape, "count": 1, **({"color": i.color} if colored else {})} for i in items[:2]]
    nouns = [with_article(_kind(i) if colored else i.shape) for i in items[:2]]
    return {"tag": skill, "include": clauses, "prompt": f"a photo of {nouns[0]} and {nouns[1]}"}


def rich_prompt(scene: Scene, skill: str, rng: np.random.Generator) -> str:
    """A prompt that says more than the skill asks for (colours where there are several objects, sides, cells)."""
    items = list(scene.objects)
    if rng.random() < 0.4:
        return f"a photo of {description(scene)}"
    first = items[0]
    if len(items) == 1:
        if rng.random() < 0.5:
            return f"a photo of {with_article(_kind(first))} in the {CELL_NAMES[first.cell]}"
        return f"a photo of {with_article(_kind(first))}"
    if skill == "counting":
        same = len({item.color for item in items}) == 1
        color = f"{first.color} " if same else ""
        return f"a photo of {NUMBERS[len(items)]} {color}{plural(first.shape)}"
    if rng.random() < 0.5:
        items.reverse()
    how = relation(items[0], items[1])
    return f"a photo of {with_article(_kind(items[0]))} {how or 'and'} {with_article(_kind(items[1]))}"


def captions(scene: Scene, skill: str, rng: np.random.Generator) -> list[str]:
    """Several true captions, from the full description to the bare prompt of the skill."""
    return [description(scene), rich_prompt(scene, skill, rng), prompt_record(scene, skill)["prompt"]]


def scene_prompts(skill: str, count: int, rng: np.random.Generator) -> list[dict]:
    """`count` different GenEval records of one skill (fewer where the skill does not have as many)."""
    records: dict[str, dict] = {}
    for _ in range(count * 50):
        record = prompt_record(sample_scene(rng, skill), skill)
        records.setdefault(record["prompt"], record)
        if len(records) == count:
            break
    return list(records.values())


# Questions -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """A question about a scene with its true answer and the wrong ones it can be confused with."""

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
    kinds = _unique([_kind(item) for item in scene.objects])
    if not kinds:
        return None
    kind = str(rng.choice(kinds))
    answer = CELL_NAMES[next(item.cell for item in scene.objects if _kind(item) == kind)]
    return Question("location", f"Where is the {kind}?", answer, tuple(n for n in CELL_NAMES if n != answer))


def _relation_question(scene: Scene, rng: np.random.Generator) -> Question | None:
    if len(scene.objects) != 2:
        return None
    first, second = (scene.objects[i] for i in rng.permutation(2))
    answer = relation(first, second)
    if answer is None or first.shape == second.shape:
        return None
    text = f"Where is the {first.shape} relative to the {second.shape}?"
    return Question("relation", text, answer, tuple(r for r in RELATIONS if r != answer))


def _existence_question(scene: Scene, rng: np.random.Generator) -> Question | None:
    present = {_kind(item) for item in scene.objects}
    if rng.random() < 0.5:
        return Question("existence", f"Is there {with_article(str(rng.choice(sorted(present))))}?", "yes", ("no",))
    item = scene.objects[int(rng.integers(len(scene.objects)))]
    # An absent object that shares its shape or its colour with one that is there: a question worth asking.
    near = [f"{color} {item.shape}" for color in COLORS] + [f"{item.color} {shape}" for shape in SHAPES]
    absent = sorted(set(near) - present)
    return Question("existence", f"Is there {with_article(str(rng.choice(absent)))}?", "no", ("yes",))


_QUESTIONS = {
    "color": (_color_question, 0.26),
    "shape": (_shape_question, 0.22),
    "counting": (_counting_question, 0.18),
    "location": (_location_question, 0.13),
    "relation": (_relation_question, 0.13),
    "existence": (_existence_question, 0.08),
}


def sample_question(scene: Scene, rng: np.random.Generator) -> Question:
    """A question that the scene answers, categories drawn with the corpus's fixed weights."""
    names, weights = list(_QUESTIONS), np.array([weight for _, weight in _QUESTIONS.values()])
    while True:
        question = _QUESTIONS[str(rng.choice(names, p=weights / weights.sum()))][0](scene, rng)
        if question is not None:
            return question


def options(question: Question, rng: np.random.Generator) -> tuple[list[str], str]:
    """Up to four options in random order, and the letter of the right one."""
    wrong = rng.permutation(question.distractors)[: len(OPTION_LETTERS) - 1].tolist()
    choices = [str(choice) for choice in rng.permutation([question.answer, *wrong])]
    return choices, OPTION_LETTERS[choices.index(question.answer)]


def multiple_choice(text: str, choices: Sequence[str]) -> str:
    """A question in MMBench's layout: question, lettered options, the instruction to name one of them."""
    lines = [f"{letter}. {choice}" for letter, choice in zip(OPTION_LETTERS, choices, strict=False)]
    return "\n".join([text, *lines, MULTIPLE_CHOICE_PROMPT])


def mmbench_rows(count: int, rng: np.random.Generator, image_size: int = 48) -> list[dict]:
    """`count` questions with MMBench's columns; absent options are the string "nan", as MMBench has them."""
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


# LLaVA records -------------------------------------------------------------------------------------------------


def _turns(*pairs: tuple[str, str]) -> list[dict]:
    return [
        turn
        for question, answer in pairs
        for turn in ({"from": "human", "value": question}, {"from": "gpt", "value": answer})
    ]


def _record(name: str, kind: str, turns: list[dict]) -> dict:
    return {"id": f"{name.rsplit('/', 1)[-1].split('.')[0]}-{kind}", "image": name, "conversations": turns}


def pretrain_records(scene: Scene, skill: str, name: str, rng: np.random.Generator) -> list[dict]:
    """One reading and one drawing record: the alignment data of stage 1."""
    full = description(scene)
    return [
        _record(name, "read", _turns((f"<image>\n{DESCRIBE_PROMPT}", full))),
        _record(name, "draw", _turns((rich_prompt(scene, skill, rng), "<image>"))),
    ]


def question_turns(scene: Scene, rng: np.random.Generator, num_questions: int) -> list[tuple[str, str]]:
    """Question and answer pairs, one third of them with options: open questions teach as much in fewer tokens."""
    pairs = []
    for _ in range(num_questions):
        question = sample_question(scene, rng)
        if rng.random() < 0.34:
            text = multiple_choice(question.text, options(question, rng)[0])
        else:
            text = question.text
        pairs.append((text, question.answer))
    return pairs


def finetune_records(scene: Scene, skill: str, name: str, rng: np.random.Generator) -> list[dict]:
    """One reading record of several questions and three drawing records: the instruction data of stage 2."""
    pairs = question_turns(scene, rng, num_questions=3)
    pairs[0] = (f"<image>\n{pairs[0][0]}", pairs[0][1])
    bare = prompt_record(scene, skill)["prompt"]
    prompts = {"draw": bare, "draw-again": bare, "draw-rich": rich_prompt(scene, skill, rng)}
    drawings = [_record(name, kind, _turns((prompt, "<image>"))) for kind, prompt in prompts.items()]
    return [_record(name, "read", _turns(*pairs)), *drawings]


@dataclass(frozen=True)
class Pictured:
    """A scene, the skill that it was made for, and the name of its image."""

    scene: Scene
    skill: str
    name: str


def interleaved_records(this: Pictured, other: Pictured, rng: np.random.Generator) -> list[dict]:
    """Conversations that go on: questions about what was drawn, a drawing after questions or after another drawing, and
    an image drawn again as it is shown."""
    asked = [(rich_prompt(this.scene, this.skill, rng), "<image>"), *question_turns(this.scene, rng, num_questions=2)]
    wish = (rich_prompt(other.scene, other.skill, rng), "<image>")
    if rng.random() < 0.5:
        ((question, answer),) = question_turns(this.scene, rng, num_questions=1)
        before = (f"<image>\n{question}", answer)
    else:
        before = asked[0]
    return [
        {**_record(this.name, "ask-drawn", _turns(*asked)), "drawn": [False]},
        {
            **_record(this.name, "draw-next", _turns(before, wish)),
            "image": [this.name, other.name],
            "drawn": [False, True],
        },
        {**_record(this.name, "copy", _turns(("<image>\nDraw it again.", "<image>"))), "image": [this.name, this.name]},
    ]


def text_records(count: int, seed: int) -> list[dict]:
    """Text-only conversations about scenes told in words: what the embedded backbone learns language from."""
    rng = np.random.default_rng([seed, 2])
    records = []
    for n in range(count):
        scene = sample_scene(rng, SKILLS[n % len(SKILLS)])
        told = f"The image shows {description(scene)}."
        pairs = [(f"{told}\n{DESCRIBE_PROMPT}", description(scene)), *question_turns(scene, rng, num_questions=2)]
        records.append({"id": f"text-{n:06d}", "conversations": _turns(*pairs)})
    return records
