"""Recipes: YAML values, flags that override them, and the types of the schema."""

import argparse
from dataclasses import dataclass, field

import pytest

from evotok_plugin.common.recipes import MERGED, add_arguments, check_seed, find_recipe, load_recipe, save_resolved
from evotok_plugin.errors import UserError
from evotok_plugin.training.config import TokenizerTrainingConfig


@dataclass(kw_only=True)
class Schema:
    name: str = "x"
    rate: float = 0.1
    steps: int | None = None
    flag: bool = False
    paths: list[str] = field(default_factory=list)
    sizes: dict = field(default_factory=dict, metadata={MERGED: True})
    rewards: dict = field(default_factory=dict)


BOMB = "b0: &b0 [x, x]\n" + "".join(f"b{n}: &b{n} [{', '.join([f'*b{n - 1}'] * 10)}]\n" for n in range(1, 9))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "unfold to more than"),
        ("paths: &a [*a]", "an alias contains itself"),
        ("rate: 1\nsteps: 2\nrate: 3", "the key 'rate' occurs 2 times; keep one"),
        ("sizes: {a: 1, a: 2}", "the key 'a' occurs 2 times"),
        ("rate: !!python/object/apply:os.system [true]", "could not determine a constructor"),
        ("paths: [" * 10_000, "nested too deeply"),
        ("date: 2026-99-99", "month must be in"),
    ],
)  # fmt: skip
def test_yaml_that_explodes_or_hides_values_is_rejected(tmp_path, text, message):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError, match=f"r.yaml: not valid YAML: .*{message}"):
        load_recipe(tmp_path / "r.yaml", Schema)


def test_a_few_aliases_are_values(tmp_path):
    (tmp_path / "r.yaml").write_text("paths: &p [a, b]\nsizes: {shown: *p}\n")
    assert load_recipe(tmp_path / "r.yaml", Schema).sizes == {"shown": ["a", "b"]}


def test_seeds_that_no_generator_accepts_are_rejected():
    check_seed(0), check_seed(2**32 - 1, bits=32)
    for seed, bits in ((-1, 62), (10**30, 62), (2**32, 32)):
        with pytest.raises(UserError, match=rf"seed must be from 0 to 2\*\*{bits} - 1, got"):
            check_seed(seed, bits)


def test_flags_override_the_recipe_and_values_get_the_types_of_the_schema(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("rate: 1e-3\nsteps: 7\nflag: true\n")
    parser = argparse.ArgumentParser()
    add_arguments(parser, Schema)
    given = vars(parser.parse_args(["--steps", "9", "--paths", "a", "b", "--flag", "False"]))
    assert load_recipe(recipe, Schema, given) == Schema(rate=1e-3, steps=9, flag=False, paths=["a", "b"])
    assert vars(parser.parse_args(["--flag"])) == {"flag": "true"}
    assert load_recipe(recipe, Schema, {"steps": "none"}).steps is None
    assert load_recipe(recipe, Schema, {"sizes": "{width: 3}"}).sizes == {"width": 3}
    save_resolved(Schema(steps=3), tmp_path / "resolved.yaml")
    assert load_recipe(tmp_path / "resolved.yaml", Schema) == Schema(steps=3)


def test_a_merged_mapping_replaces_only_the_keys_that_it_contains(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("sizes: {width: 3, height: 4}\nrewards: {color: 1}\n")
    given = {"sizes": "{width: 5, depth: 1}", "rewards": "{shape: 1}"}
    loaded = load_recipe(recipe, Schema, given)
    assert loaded.sizes == {"width": 5, "height": 4, "depth": 1} and loaded.rewards == {"shape": 1}
    assert load_recipe(recipe, Schema, {"sizes": "{}"}).sizes == {"width": 3, "height": 4}
    config = load_recipe(
        find_recipe("photos", "evotok_plugin"),
        TokenizerTrainingConfig,
        {"data": ["photos"], "output_dir": "out", "model": "{quantizer: fsq}"},
    )
    assert config.model["quantizer"] == "fsq" and config.model["image_size"] == 64


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rat: 1", "unknown key 'rat'; did you mean 'rate'"),
        ("steps: 1.5", "steps: expected a whole number"),
        ("rate: fast", "rate: could not convert"),
        ("flag: maybe", "flag: expected true or false"),
        ("sizes: 3", "sizes: expected a mapping such as '{image_size: 64}', got 3"),
        ("- a\n- b", "expected 'key: value' lines"),
        ("a: [", "not valid YAML"),
        ("name: 2020-13-45", "r.yaml: not valid YAML: month must be in 1..12"),
        ("steps: !!int abc", "not valid YAML: invalid literal"),
        ("name: !!timestamp abc", "not valid YAML"),
        ("name: " + 5000 * "[", "not valid YAML: it is nested too deeply"),
        ("1: 2", "expected names of settings as keys, got 1"),
        ("name: [a, b]", r"name: expected text, got \['a', 'b'\]"),
        ("name: 2020-01-02", "name: expected text, got datetime.date"),
        ("steps: true", "steps: expected a whole number, got True"),
        ("rate: false", "rate: expected a number, got False"),
        ("rate: .nan", "rate: expected a number, got nan"),
        ("sizes: {1: 2}", "sizes: expected a mapping"),
        ("sizes: '{a: !!int b}'", "sizes: expected a mapping"),
    ],
)
def test_invalid_recipes_are_rejected(tmp_path, text, message):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(text)
    with pytest.raises(UserError, match=message):
        load_recipe(recipe, Schema)
