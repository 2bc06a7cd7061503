"""LLaVA records about scenes: descriptions, drawings, questions, interleaved conversations and text."""

from dataclasses import dataclass

import numpy as np

from evotok_plugin.scenes.captions import description, places, prompt_record, rich_prompt, with_article
from evotok_plugin.scenes.other_topics import drawing_request, other_topic_turns
from evotok_plugin.scenes.questions import (
    TRAINING_SHARES,
    Question,
    multiple_choice,
    options,
    sample_question,
    sample_relation_question,
)
from evotok_plugin.scenes.scene import SKILLS, Scene, sample_scene

DESCRIBE_PROMPT = "Describe the image."
PLACES_PROMPT = "Where is everything?"
SHAPES_FIRST_PROMPT = "List shape, color and place."
# The instruction by which a model judges its own drawings (`llava_ext.generation.reading_score`).
WRITE_PROMPT = "Write a prompt for this image."
_MULTIPLE_CHOICE = 0.2  # share of the questions
_RELATION_CHOICES = 0.3  # the same share of the relation questions
_OTHER_TOPIC = 0.1  # share of the images that are also asked something outside the domain


def _turns(*pairs: tuple[str, str]) -> list[dict]:
    return [
        turn
        for question, answer in pairs
        for turn in ({"from": "human", "value": question}, {"from": "gpt", "value": answer})
    ]


def _record(name: str, kind: str, turns: list[dict]) -> dict:
    return {"id": f"{name.rsplit('/', 1)[-1].split('.')[0]}-{kind}", "image": name, "conversations": turns}


def pretrain_records(scene: Scene, skill: str, name: str, rng: np.random.Generator) -> list[dict]:
    """One record that reads the image and one that draws it: the alignment data of stage 1."""
    full = description(scene)
    return [
        _record(name, "read", _turns((f"<image>\n{DESCRIBE_PROMPT}", full))),
        _record(name, "draw", _turns((rich_prompt(scene, skill, rng), "<image>"))),
    ]


def question_turns(scene: Scene, rng: np.random.Generator, num_questions: int) -> list[tuple[str, str]]:
    """Sample question and answer pairs, a fifth of them multiple choice, none repeated in the same form.

    Open-ended questions teach as much in fewer tokens.
    """
    pairs: dict[str, str] = {}
    for _ in range(num_questions):
        question = sample_question(scene, rng, TRAINING_SHARES)
        pairs.setdefault(_form(question, rng, _MULTIPLE_CHOICE), question.answer)
    return list(pairs.items())


def _form(question: Question, rng: np.random.Generator, multiple_choice_share: float) -> str:
    """The text of a question, with options in a share of the cases."""
    if rng.random() < multiple_choice_share:
        return multiple_choice(question.text, options(question, rng)[0])
    return question.text


def question_records(scene: Scene, name: str, num_questions: int, rng: np.random.Generator) -> list[dict]:
    """Records of one question each about the image.

    A small model learns to look up an object far faster from single questions than from conversations of several, where
    earlier answers distract and the image is at changing distances.
    """
    pairs = question_turns(scene, rng, num_questions)
    if rng.random() < _OTHER_TOPIC:
        pairs.append(other_topic_turns(rng))
    return [
        _record(name, f"question-{n}", _turns((f"<image>\n{question}", answer)))
        for n, (question, answer) in enumerate(pairs)
    ]


def finetune_records(scene: Scene, skill: str, name: str, rng: np.random.Generator) -> list[dict]:
    """The instruction data of stage 2 besides questions: a prompt for the image, and drawings of it."""
    bare, rich = prompt_record(scene, skill)["prompt"], rich_prompt(scene, skill, rng)
    thing = (bare if rng.random() < 0.5 else rich).removeprefix("a photo of ")
    prompts = {"draw": bare, "draw-rich": rich, "draw-asked": drawing_request(thing, rng)}
    drawings = [_record(name, kind, _turns((prompt, "<image>"))) for kind, prompt in prompts.items()]
    written = bare if rng.random() < 0.5 else rich
    return [_record(name, "prompt", _turns((f"<image>\n{WRITE_PROMPT}", written))), *drawings]


def places_records(scene: Scene, name: str, rng: np.random.Generator) -> list[dict]:
    """A record that lists the places of all objects, or none if there is only one object.

    Every word but the first of an object can only be known by finding the object in the image: its shape by its color,
    or its color by its shape, then its place. The order is random, since otherwise the next object would follow from
    the places already listed. A small model learns to find objects from lists many times faster than from questions.
    """
    if len(scene.objects) < 2:
        return []
    shape_first = bool(rng.random() < 0.5)
    prompt = SHAPES_FIRST_PROMPT if shape_first else PLACES_PROMPT
    return [_record(name, "places", _turns((f"<image>\n{prompt}", places(scene, rng, shape_first))))]


def relation_records(scene: Scene, name: str, rng: np.random.Generator) -> list[dict]:
    """Up to two records of a question each about how two objects lie relative to each other.

    It is the hardest kind of question for a small model: it has to find two objects and to compare their places.
    """
    records = []
    for n in range(2):
        question = sample_relation_question(scene, rng)
        if question is not None:
            turns = _turns((f"<image>\n{_form(question, rng, _RELATION_CHOICES)}", question.answer))
            records.append(_record(name, f"relation-{n}", turns))
    return records


def single_records(scene: Scene, name: str) -> list[dict]:
    """A record that draws the image of a single object from its color and shape, or none for several objects.

    From these drawings a model learns which codes the words stand for. Prompts of several objects teach that much more
    slowly: at each position, a word then matters only if its object is the one that is drawn there.
    """
    if len(scene.objects) != 1:
        return []
    return [_record(name, "single", _turns((f"a photo of {with_article(scene.objects[0].kind)}", "<image>")))]


def mixed_records(scene: Scene, name: str) -> list[dict]:
    """Records of a mixed scene (`sample_mixed_scene`) besides questions: its description, and a drawing of it."""
    full = description(scene)
    return [
        _record(name, "describe", _turns((f"<image>\n{DESCRIBE_PROMPT}", full))),
        _record(name, "draw", _turns((f"a photo of {full}", "<image>"))),
    ]


@dataclass(frozen=True)
class SceneImage:
    """A scene, the skill it was sampled for, and the file name of its image."""

    scene: Scene
    skill: str
    name: str


def interleaved_records(this: SceneImage, other: SceneImage, rng: np.random.Generator) -> list[dict]:
    """Conversations of several turns: questions about a drawn image, a drawing after a question or another drawing, and
    a copy of a shown image."""
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
    """Text-only conversations about described scenes, which the embedded backbone learns language from."""
    rng = np.random.default_rng([seed, 2])
    records = []
    for n in range(count):
        scene = sample_scene(rng, SKILLS[n % len(SKILLS)])
        told = f"The image shows {description(scene)}."
        pairs = [(f"{told}\n{DESCRIBE_PROMPT}", description(scene)), *question_turns(scene, rng, num_questions=2)]
        records.append({"id": f"text-{n:06d}", "conversations": _turns(*pairs)})
    return records
