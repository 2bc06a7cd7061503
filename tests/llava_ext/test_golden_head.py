"""The depth transformer against logits of the research code, where those are at hand."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from research_layout import research_depth_transformer
from safetensors.torch import load_file

from evotok_plugin import DepthTransformerConfig, DepthTransformerHead
from evotok_plugin.conversion import read_checkpoint
from llava_ext.conversion import convert_depth_transformer

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason="research outputs (../shared/golden) are not here")
KEYS = GOLDEN / "depth_transformer_keys.json"


def stand_in():
    spec = importlib.util.spec_from_file_location("stand_in_weights", GOLDEN / "stand_in_weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def test_logits_equal_those_of_the_research_code(tmp_path):
    make, expected = stand_in(), load_file(GOLDEN / "depth_transformer_expected.safetensors")
    weights = {
        f"model.vision_tower.rqtransformer.{name}": torch.from_numpy(v) for name, v in make.state_dict(KEYS).items()
    }
    torch.save(weights, tmp_path / "rqtransformer.bin")
    converted = convert_depth_transformer(read_checkpoint(tmp_path / "rqtransformer.bin"), num_heads=8)
    head = DepthTransformerHead(converted.sizes)
    head.load_state_dict(converted.state)

    names = [f"quantize.codebooks.{level}.weight" for level in range(4)]
    codebooks = torch.stack([torch.from_numpy(make.tensor(name, [513, 32], 0)[:-1]) for name in names])
    latents = codebooks[torch.arange(4), expected["codes"].long()]  # (2, 20, 4, C)
    logits = torch.stack(head(expected["hidden_states"].flatten(0, 1), latents.flatten(0, 1)), dim=1)
    torch.testing.assert_close(logits.view(2, 20, 4, 512), expected["logits"], atol=1e-3, rtol=0)
    assert len(head.classifiers) == 4 and sum(converted.bookkeeping.values()) == 12 * 4


def test_the_layout_of_the_other_tests_is_the_research_code_s():
    with torch.device("meta"):
        made = research_depth_transformer(
            DepthTransformerHead(DepthTransformerConfig(96, 32, 512, 4, 128, 3, 8)), prefix=""
        )
    assert {name: list(tensor.shape) for name, tensor in made.items()} == json.loads(KEYS.read_text())
