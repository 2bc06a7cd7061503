"""Recipes and DeepSpeed configurations of the packages."""

import pytest
import yaml

from evotok_plugin.common.recipes import load_recipe, recipe_values, recipes_folder
from evotok_plugin.configuration_evotok import EvoTokConfig
from evotok_plugin.training.config import TokenizerTrainingConfig
from llava_ext.training.config import StageConfig
from llava_ext.training.deepspeed_config import find_deepspeed_config, read_deepspeed_config
from llava_ext.training.reinforcement.config import ReinforceConfig

RECIPES = sorted(recipes_folder("llava_ext").glob("*.yaml"))


TOKENIZER_RECIPES = sorted(recipes_folder("evotok_plugin").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_of_a_stage_fits_its_schema(path):
    schema = ReinforceConfig if path.stem == "reinforce" else StageConfig
    assert find_deepspeed_config(recipe_values(path, schema, {})["deepspeed"]).is_file()


@pytest.mark.parametrize("name", ["tiny", "photos", "base", "paper", "paper_384"])
def test_every_tokenizer_recipe_fits_its_schema_and_preset(name):
    given = {"data": "x", "output_dir": "y"} | ({"teacher": "z"} if name == "tiny" else {})
    config = load_recipe(name, TokenizerTrainingConfig, given)
    assert EvoTokConfig.preset(config.preset, **config.model).num_positions > 0 and config.data == ["x"]


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_configurations_do_not_override_recipes(stage):
    for name in {2: ["zero2"], 3: ["zero3", "zero3_offload"]}[stage]:
        settings = read_deepspeed_config(name)
        assert settings["zero_optimization"]["stage"] == stage and "optimizer" not in settings
        assert settings["train_batch_size"] == settings["bf16"]["enabled"] == "auto"
        if stage == 3:
            assert settings["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True


def test_recipes_are_short_mappings():
    assert RECIPES and TOKENIZER_RECIPES
    for path in [*RECIPES, *TOKENIZER_RECIPES]:
        assert isinstance(yaml.safe_load(path.read_text()), dict)
