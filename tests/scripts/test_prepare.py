import subprocess
from pathlib import Path

import pytest
import yaml

from evotok_plugin.configuration_evotok import EvoTokConfig
from evotok_plugin.recipes import RECIPES_FOLDER, load_recipe, recipe_values
from evotok_plugin.training.config import TokenizerTrainingConfig
from llava_ext.training.config import StageConfig, find_deepspeed_config
from llava_ext.training.prepare import DONE, make, uses_embedded_default

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("path", sorted(RECIPES_FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_of_a_stage_fits_its_schema(path):
    assert find_deepspeed_config(recipe_values(path, StageConfig, {})["deepspeed"]).is_file()


@pytest.mark.parametrize("name", ["tiny", "photos", "base", "paper", "paper_384"])
def test_every_tokenizer_recipe_fits_its_schema_and_preset(name):
    given = {"data": "x", "output_dir": "y"} | ({"teacher": "z"} if name == "tiny" else {})
    config = load_recipe(name, TokenizerTrainingConfig, given, kind="tokenizer")
    assert EvoTokConfig.preset(config.preset, **config.model).num_positions > 0 and config.data == ["x"]


def test_only_the_embedded_recipes_ask_for_preparation():
    assert uses_embedded_default("pretrain", [])
    assert uses_embedded_default("pretrain", ["--max_steps", "3"])
    assert not uses_embedded_default("pretrain", ["--data_path", "mine.json"])
    assert not uses_embedded_default("pretrain", ["--model_name_or_path=llm"])
    assert not uses_embedded_default("finetune", [])
    assert not uses_embedded_default("paper", [])


def test_a_step_is_done_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "thing"

    def fail(out):
        (out / "half").write_text("x")
        raise ValueError("stopped")

    with pytest.raises(ValueError, match="stopped"):
        make(folder, "a thing", fail)
    assert not folder.exists()
    make(folder, "a thing", lambda out: (out / "whole").write_text("x"))
    assert {path.name for path in folder.iterdir()} == {"whole", DONE}
    make(folder, "a thing", fail)  # there already: not built again


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").rglob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_valid_bash(script):
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_the_readme_names_only_scripts_and_recipes_that_exist():
    readme = (ROOT / "README.md").read_text()
    words = {word.strip("`,.;:()") for word in readme.split()}
    for word in words:
        if word.startswith("scripts/") and word.endswith(".sh"):
            assert (ROOT / word).is_file(), word
    for first, second in zip(readme.split(), readme.split()[1:], strict=False):
        if first == "--recipe" and second.isidentifier():
            found = [RECIPES_FOLDER / f"{second}.yaml", RECIPES_FOLDER / "tokenizer" / f"{second}.yaml"]
            assert any(path.is_file() for path in found), second
    for line in readme.splitlines():
        if line.startswith("![") and "](docs/" in line:
            assert (ROOT / line.split("](")[1].rstrip(")")).is_file(), line


def test_recipes_are_short_mappings():
    for path in RECIPES_FOLDER.rglob("*.yaml"):
        assert isinstance(yaml.safe_load(path.read_text()), dict)
