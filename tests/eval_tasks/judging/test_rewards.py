"""Rewards from judges: of scenes for true and false prompts, of damaged scenes, and independent of the batch."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from eval_tasks.judging.rewards import SceneExactReward, SceneReward
from eval_tasks.judging.rules import evaluate
from eval_tasks.judging.scene_detector import SceneDetector, degrading
from evotok_plugin.errors import UserError
from evotok_plugin.scenes.captions import prompt_record, scene_captions
from evotok_plugin.scenes.prompt_parser import parse_prompt
from evotok_plugin.scenes.scene import BACKGROUND, COLORS, SKILLS, Scene, place, render, sample_scene
from llava_ext.rewards import load_rewards

JUDGE, EXACT = SceneReward(), SceneExactReward()


def drawn(rng, *objects: tuple[str, str, int]) -> Image.Image:
    return render(Scene(tuple(place(rng, shape, color, cell) for shape, color, cell in objects)))


def test_scenes_are_right_for_all_their_prompts(rng):
    scenes = [(sample_scene(rng, skill), skill) for skill in SKILLS for _ in range(8)]
    pairs = [(text, render(scene)) for scene, skill in scenes for text in scene_captions(scene, skill, rng)]
    for reward in (JUDGE, EXACT):
        assert set(reward(*zip(*pairs, strict=True))) == {1.0}


def test_exact_scores_equal_the_truth_of_the_prompt(rng):
    """Pairs of prompts and scenes that differ in little: the second object of a scene is changed."""
    num_right = 0
    for number in range(60):
        skill = ("two_object", "color_attr", "position", "counting")[number % 4]
        scene = sample_scene(rng, skill)
        other = sample_scene(rng, skill)
        kind = other.objects[1] if number % 8 < 4 else scene.objects[1]
        changed = Scene((scene.objects[0], place(rng, kind.shape, kind.color, scene.objects[1].cell)))
        for text in scene_captions(scene, skill, rng):
            truth = parse_prompt(text).shown_by(changed)
            assert EXACT([text], [render(changed)]) == [float(truth)], text
            num_right += truth
    assert 30 < num_right < 150


def test_the_scene_judge_gives_the_verdicts_of_geneval(rng):
    detector = SceneDetector()
    records = [prompt_record(sample_scene(rng, skill), skill) for skill in SKILLS for _ in range(6)]
    images = [render(sample_scene(rng, SKILLS[n % len(SKILLS)])) for n in range(len(records))]
    expected = [
        float(evaluate(record, detector.detect(image), detector.rules).correct)
        for record, image in zip(records, images, strict=True)
    ]
    assert JUDGE([record["prompt"] for record in records], images) == expected
    assert 0 < sum(expected) < len(expected)


@pytest.mark.parametrize(
    ("prompt", "judge", "exact"),
    [
        ("a photo of a circle", 1, 0),
        ("a photo of a red circle", 1, 0),
        ("a photo of a circle and a ring", 1, 1),
        ("a photo of a blue circle and a red ring", 0, 0),
        ("a photo of a circle left of a ring", 1, 1),
        ("a photo of a red circle right of a blue ring", 0, 0),
        ("a red circle in the top left, a blue ring in the top right", 1, 1),
        ("a red circle in the top left, a blue ring in the top", 0, 0),
        ("a red circle in the top left", 1, 0),
        ("a red circle in the left", 0, 0),
        ("a photo of two circles", 0, 0),
    ],
)
def test_a_pair_of_objects(rng, prompt, judge, exact):
    image = drawn(rng, ("circle", "red", 0), ("ring", "blue", 2))
    assert (JUDGE([prompt], [image]), EXACT([prompt], [image])) == ([judge], [exact])


@pytest.mark.parametrize(
    ("prompt", "judge", "exact"),
    [
        ("a photo of three rings", 1, 1),
        ("a photo of three red rings", 0, 0),
        ("a photo of two rings", 0, 0),
        ("a photo of a red ring and a blue ring", 1, 0),
        ("a photo of a red ring above a blue ring", 0, 0),
        ("a photo of a blue ring above a red ring", 1, 0),
        ("a blue ring in the top, a red ring in the center, a red ring in the bottom", 1, 1),
        ("a red ring in the top, a red ring in the center, a blue ring in the bottom", 0, 0),
    ],
)
def test_several_objects_of_one_shape(rng, prompt, judge, exact):
    image = drawn(rng, ("ring", "red", 4), ("ring", "blue", 1), ("ring", "red", 7))
    assert (JUDGE([prompt], [image]), EXACT([prompt], [image])) == ([judge], [exact])


def test_what_is_not_an_object_is_not_exact(rng):
    prompt, clean = "a photo of a red circle", drawn(rng, ("circle", "red", 4))
    bar, fragment, speck = clean.copy(), clean.copy(), clean.copy()
    ImageDraw.Draw(bar).rectangle((2, 43, 45, 45), fill=COLORS["green"])  # fits no shape
    ImageDraw.Draw(fragment).rectangle((3, 3, 6, 6), fill=COLORS["green"])  # too small for an object
    ImageDraw.Draw(speck).rectangle((3, 3, 4, 3), fill=COLORS["green"])
    images = [clean, bar, fragment, speck, Image.new("RGB", (48, 48), BACKGROUND)]
    assert JUDGE([prompt] * 5, images) == [1, 1, 1, 1, 0]
    assert EXACT([prompt] * 5, images) == [1, 0, 0, 1, 0]


def test_an_object_cut_by_the_border_is_in_a_cell_of_the_border():
    image = Image.new("RGB", (48, 48), BACKGROUND)
    ImageDraw.Draw(image).ellipse((-5, 17, 9, 31), fill=COLORS["blue"])
    assert len(SceneDetector().detect(image)) == 1
    assert JUDGE(["a blue circle in the left"], [image]) == [1.0]


@pytest.mark.parametrize("reward", [JUDGE, EXACT])
def test_scene_rewards_do_not_depend_on_the_batch(reward, rng):
    damage = degrading(1.0, 12.0)
    prompts, images = [], []
    for number in range(40):
        scene = sample_scene(rng, SKILLS[number % len(SKILLS)])
        prompts.append(prompt_record(scene, SKILLS[(number if number % 2 else number + 1) % len(SKILLS)])["prompt"]
                       if len(scene.objects) > 1 else "a photo of a ring")  # fmt: skip
        images.append(damage(render(scene, 48 if number % 3 else 64)))
    together = reward(prompts, images)
    order = np.random.default_rng(0).permutation(len(images))
    assert reward([prompts[n] for n in order], [images[n] for n in order]) == [together[n] for n in order]
    assert [score for pair in zip(prompts, images, strict=True) for score in reward(pair[:1], pair[1:])] == together
    assert 0 < sum(together) < len(together) and reward([], []) == []


def test_a_prompt_that_is_not_of_a_scene_is_an_error():
    for name in ("SceneReward", "SceneExactReward"):
        reward = load_rewards(f"eval_tasks.judging.rewards:{name}")
        with pytest.raises(UserError, match="'a photo of a dog' is not a scene prompt"):
            reward(["a photo of a dog"], [Image.new("RGB", (48, 48))])
