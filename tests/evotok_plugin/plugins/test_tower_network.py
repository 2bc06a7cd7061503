"""The tower in plain PyTorch: weights, ranges of pixels, precision, and independence of transformers."""

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from evotok_plugin import EvoTokVisionModel, EvoTokVisionTower
from evotok_plugin.errors import UserError
from evotok_plugin.plugins.tower_network import TowerNetwork, is_evotok_folder, read_settings
from llava_ext.model_folder import INCLUDED_MODEL

ROOT = Path(__file__).resolve().parents[3]
BLOCKED = ("transformers", "tokenizers", "huggingface_hub", "yaml", "tqdm", "jinja2", "accelerate", "torchvision")


def network(folder, pixel_range=None) -> TowerNetwork:
    return TowerNetwork(folder, read_settings(folder, pixel_range))


def test_features_equal_those_of_the_tokenizer(tiny_evotok_folder, pixel_values, features):
    torch.testing.assert_close(network(tiny_evotok_folder)(pixel_values), features)


def test_the_weights_have_the_names_of_the_transformers_tower(tiny_evotok_folder, tower):
    names = {name: value.shape for name, value in tower.state_dict().items() if name != "quantizer.codebooks"}
    assert {name: value.shape for name, value in network(tiny_evotok_folder).state_dict().items()} == names


def test_saved_towers_and_models_that_contain_one_are_read(tiny_evotok_folder, tower, pixel_values, features, tmp_path):
    tower.save_pretrained(tmp_path / "tower")
    assert is_evotok_folder(tmp_path / "tower") and is_evotok_folder(INCLUDED_MODEL)
    torch.testing.assert_close(network(tmp_path / "tower")(pixel_values), features)
    included = network(INCLUDED_MODEL)
    assert included.config.image_size == 48 and included(pixel_values).shape == (2, 9, 128)


@pytest.mark.parametrize("size", [(48, 48), (96, 48)])
def test_other_sizes_of_images_are_interpolated(tiny_evotok_folder, tower, size):
    images = torch.rand(1, 3, *size) * 2 - 1
    expected = tower(images).last_hidden_state
    torch.testing.assert_close(network(tiny_evotok_folder)(images), expected)


def test_another_range_of_pixels_is_scaled(tiny_evotok_folder, pixel_values, features, pictures):
    unit = (pixel_values + 1) / 2
    tower = EvoTokVisionTower(tiny_evotok_folder, pixel_range=(0, 1))
    torch.testing.assert_close(tower(unit), features, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(EvoTokVisionTower(tiny_evotok_folder)(unit), features, atol=1e-2)
    prepared = tower.image_processor(pictures).pixel_values
    signed = EvoTokVisionTower(tiny_evotok_folder).image_processor(pictures).pixel_values
    torch.testing.assert_close(prepared, (signed + 1) / 2)
    assert tower.image_processor.image_mean == [0, 0, 0] and tower.image_processor.image_std == [1, 1, 1]


def test_the_range_of_pixels_is_saved_with_the_transformers_tower(tiny_evotok_folder, pixel_values, features, tmp_path):
    model = EvoTokVisionModel.from_pretrained(tiny_evotok_folder, pixel_range=(0, 1))
    model.save_pretrained(tmp_path)
    for again in (EvoTokVisionModel.from_pretrained(tmp_path).eval(), network(tmp_path)):
        found = again((pixel_values + 1) / 2)
        torch.testing.assert_close(getattr(found, "last_hidden_state", found), features, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pixel_range", [(1, 0), (0,), (0, 0)])
def test_a_range_must_increase(tiny_evotok_folder, pixel_range):
    with pytest.raises(UserError, match="pixel_range: expected the values of black and white"):
        EvoTokVisionTower(tiny_evotok_folder, pixel_range=pixel_range)


def test_codes_are_searched_in_float32_whatever_the_weights(tiny_evotok_folder, tokenizer, pixel_values):
    half = network(tiny_evotok_folder).to(torch.bfloat16)
    assert half.dtype == torch.bfloat16 and torch.equal(half.quantizer.codebooks, tokenizer.quantizer.codebooks)
    assert half(pixel_values).dtype == torch.bfloat16
    half.train()
    half(pixel_values)
    assert torch.equal(half.quantizer.codebooks, tokenizer.quantizer.codebooks)


def test_a_tokenizer_without_semantics_is_rejected(tiny_evotok_folder, tmp_path):
    shutil.copytree(tiny_evotok_folder, tmp_path / "pixels")
    config = tmp_path / "pixels" / "config.json"
    values = json.loads(config.read_text())
    del values["semantic_decoder_trained"]
    config.write_text(json.dumps(values))
    assert read_settings(config.parent).semantic_decoder_trained
    (config.parent / "recipe.yaml").write_text("max_steps: 10\nsemantic_weight: 0.0\n")
    with pytest.raises(UserError, match="the semantic decoder of .* was not trained"):
        read_settings(config.parent)
    config.write_text(json.dumps(values | {"patch_size": 7}))
    with pytest.raises(UserError, match="config.json cannot be used: image_size 48 is not a multiple of patch_size 7"):
        read_settings(config.parent)


def light_modules() -> list[Path]:
    """The modules that the tower imports, found by importing it in a new process without the blocked libraries."""
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({BLOCKED!r}))\n"
        "import evotok_plugin, evotok_plugin.llava\n"
        "from evotok_plugin import EvoTokVisionTower, register_llava\n"
        f"EvoTokVisionTower({str(INCLUDED_MODEL)!r})\n"
        "print(*[m.__file__ for name, m in sys.modules.items() if name.startswith('evotok_plugin')], sep='\\n')\n"
        "try:\n"
        "    evotok_plugin.EvoTokModel\n"
        "except evotok_plugin.errors.UserError as error:\n"
        "    print(error, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return [Path(line) for line in done.stdout.split()]


def test_the_tower_needs_no_transformers_and_no_new_syntax():
    paths = light_modules()
    assert ROOT / "evotok_plugin" / "plugins" / "llava.py" in paths
    for path in paths:
        ast.parse(path.read_text(), feature_version=(3, 9))
