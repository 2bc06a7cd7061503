"""Parsed prompts are true of exactly the scenes that their texts describe."""

import itertools

import pytest

from evotok_plugin.errors import UserError
from evotok_plugin.scenes.captions import description, prompt_record, scene_captions
from evotok_plugin.scenes.prompt_parser import ScenePrompt, Wanted, parse_prompt
from evotok_plugin.scenes.scene import CELL_NAMES, COLORS, SHAPES, SKILLS, Scene, place, relation, sample_scene


def facts(scene: Scene, prompt: str) -> object:
    """All that the prompt says, read from the scene: computed without the parser, by the words that the prompt has."""
    words = prompt.replace(",", "").split()
    colored = any(color in words for color in COLORS)
    placed = any(f"in the {name}" in prompt for name in CELL_NAMES)
    kinds = [(item.shape, item.color if colored else None, item.cell if placed else None) for item in scene.objects]
    related = None
    if any(how in prompt for how in ("left of", "right of", "above", "below")):
        pairs = itertools.permutations(scene.objects, 2)
        related = {(one.shape, relation(one, other), other.shape) for one, other in pairs}
    return sorted(kinds, key=str), related


@pytest.mark.parametrize("skill", SKILLS)
def test_a_prompt_is_true_of_its_scene_and_of_no_scene_that_differs_in_what_it_says(skill, rng):
    scenes = [(name, sample_scene(rng, name)) for name in SKILLS for _ in range(6)]
    num_false = 0
    for _ in range(500):
        scene = sample_scene(rng, skill)
        for text in scene_captions(scene, skill, rng):
            for prompt in (parse_prompt(text), parse_prompt(text.removeprefix("a photo of "))):
                assert prompt.shown_by(scene), text
            if "left of" in text or "right of" in text or "above" in text or "below" in text:
                others = [other for name, other in scenes if len(other.objects) == 2]
            else:
                others = [other for _, other in scenes]
            for other in others:
                assert parse_prompt(text).shown_by(other) == (facts(other, text) == facts(scene, text)), (text, other)
                num_false += facts(other, text) != facts(scene, text)
    assert num_false > 5000


@pytest.mark.parametrize("skill", SKILLS)
def test_one_changed_object_makes_a_description_false(skill, rng):
    for _ in range(100):
        scene = sample_scene(rng, skill)
        prompt = parse_prompt(description(scene))
        index = int(rng.integers(len(scene.objects)))
        item, rest = scene.objects[index], scene.objects[:index] + scene.objects[index + 1 :]
        shape = SHAPES[(SHAPES.index(item.shape) + 1) % len(SHAPES)]
        color = list(COLORS)[(list(COLORS).index(item.color) + 1) % len(COLORS)]
        empty = next(cell for cell in range(9) if cell not in [other.cell for other in scene.objects])
        for changed in (
            [],
            [item, place(rng, item.shape, item.color, empty)],
            [place(rng, shape, item.color, item.cell)],
            [place(rng, item.shape, color, item.cell)],
            [place(rng, item.shape, item.color, empty)],
        ):
            assert not prompt.shown_by(Scene((*rest, *changed)))
        assert prompt.shown_by(Scene(scene.objects[::-1]))


@pytest.mark.parametrize("skill", SKILLS)
def test_records_equal_those_of_the_skills(skill, rng):
    for _ in range(200):
        record = prompt_record(sample_scene(rng, skill), skill)
        assert parse_prompt(record["prompt"]).record() == record


def test_details_become_phrases():
    assert parse_prompt("a photo of three red triangles").wanted == (Wanted("triangle", "red", 3),)
    assert parse_prompt("a circle in the top, a red ring in the bottom left").wanted == (
        Wanted("circle", cell=1), Wanted("ring", "red", cell=6),
    )  # fmt: skip
    text = "a photo of a red circle right of a cross"
    assert parse_prompt(text) == ScenePrompt(text, (Wanted("circle", "red"), Wanted("cross")), "right of")


def test_details_extend_the_records():
    assert parse_prompt("two red rings").record() == {
        "tag": "counting", "include": [{"class": "ring", "count": 2, "color": "red"}],
        "exclude": [{"class": "ring", "count": 3}], "prompt": "two red rings",
    }  # fmt: skip
    assert parse_prompt("a red ring above a blue cross").record()["include"] == [
        {"class": "cross", "count": 1, "color": "blue"},
        {"class": "ring", "count": 1, "color": "red", "position": ["above", 0]},
    ]  # fmt: skip
    placed = parse_prompt("a red ring in the top, a blue ring in the left, a red cross in the center")
    assert placed.exceeds_records
    assert placed.record()["include"] == [{"class": "ring", "count": 2}, {"class": "cross", "count": 1}]


@pytest.mark.parametrize(
    "text",
    [
        "", "a photo of ", "a photo of a dog", "a photo of a red", "a photo of an red circle", "a circle and",
        "a photo of five circles", "a photo of one circle", "a photo of two circle", "a photo of circles",
        "a circle and a ring and a cross", "a circle in the middle", "a circle in the top, a ring", "a circle, a ring",
        "a circle near a ring", "a photo of a photo of a ring", "A photo of a ring.",
    ],
)  # fmt: skip
def test_other_texts_are_rejected(text):
    with pytest.raises(UserError, match="is not a scene prompt; expected"):
        parse_prompt(text)
