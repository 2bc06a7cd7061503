"""Rewards by name: specifications, loading and checked scores."""

import pytest
from PIL import Image

from evotok_plugin.errors import UserError
from llava_ext.rewards import WeightedRewards, load_rewards
from llava_ext.rewards.loading import read_weights


def brightness(prompts, images):
    return [image.convert("L").getextrema()[1] / 255 for image in images]


class Length:
    def __call__(self, prompts, images):
        return [len(prompt) for prompt in prompts]


@pytest.fixture
def here(monkeypatch, request):
    """The dotted name under which this module can be imported."""
    monkeypatch.syspath_prepend(request.path.parent)
    return request.path.stem


IMAGES = [Image.new("RGB", (2, 2), (level,) * 3) for level in (0, 255)]


def test_functions_and_classes_are_loaded_by_dotted_path_and_weighted(here):
    rewards = load_rewards({f"{here}:brightness": 2.0, f"{here}:Length": 0.5})
    scores = rewards.scores(["a", "abc"], IMAGES)
    assert scores == {f"{here}:brightness": [0.0, 1.0], f"{here}:Length": [1.0, 3.0]}
    assert rewards(["a", "abc"], IMAGES) == [0.5, 3.5]


def test_the_text_form_equals_the_mapping():
    assert read_weights("a.b:c=2, scene_judge") == read_weights({"a.b:c": 2.0, "scene_judge": 1}) == {
        "a.b:c": 2.0, "scene_judge": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "at least one reward"),
        ("nonsense", "unknown reward 'nonsense'"),
        ("no_such_package.at_all:thing", "cannot be loaded"),
        ("json:no_such_thing", "cannot be loaded"),
        ("json:__name__", "expected a function"),
        ("scene_judge=much", "with a number"),
        ("scene_judge=0", "other than 0"),
        ({"scene_judge": float("nan")}, "finite weight"),
        ({"scene_judge": True}, "finite weight"),
        ("scene_judge,scene_judge=2", "given twice"),
    ],
)
def test_a_wrong_specification_is_named(spec, message):
    with pytest.raises(UserError, match=message):
        load_rewards(spec)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([1.0], "expected 2 scores"),
        ([1.0, float("nan")], "image 1 is not finite"),
        (["a", "b"], "one number per image"),
    ],
)
def test_wrong_scores_are_named(scores, message):
    rewards = WeightedRewards({"mine": lambda prompts, images: scores}, {"mine": 1.0})
    with pytest.raises(UserError, match=f"reward mine: .*{message}"):
        rewards(["a", "b"], IMAGES)
