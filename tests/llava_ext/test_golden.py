"""The depth transformer against logits of the research code."""

import torch
from research_layout import research_depth_transformer
from research_weights import GOLDEN, read_layout, research_tensor, research_weights
from safetensors.torch import load_file

from evotok_plugin import DepthTransformerConfig, DepthTransformerHead
from evotok_plugin.conversion.research_file import read_checkpoint
from llava_ext.conversion import convert_depth_transformer

LAYOUT = "depth_transformer_layout"


@torch.no_grad()
def test_logits_equal_those_of_the_research_code(tmp_path):
    expected = load_file(GOLDEN / "depth_transformer.safetensors")
    weights = {
        f"model.vision_tower.rqtransformer.{name}": torch.from_numpy(v) for name, v in research_weights(LAYOUT).items()
    }
    torch.save(weights, tmp_path / "rqtransformer.bin")
    converted = convert_depth_transformer(read_checkpoint(tmp_path / "rqtransformer.bin"), num_heads=8)
    head = DepthTransformerHead(converted.sizes)
    head.load_state_dict(converted.state)

    names = [f"quantize.codebooks.{level}.weight" for level in range(4)]
    codebooks = torch.stack([torch.from_numpy(research_tensor(name, [513, 32])[:-1]) for name in names])
    latents = codebooks[torch.arange(4), expected["codes"].long()]  # (2, 20, 4, C)
    logits = torch.stack(head(expected["hidden_states"].flatten(0, 1), latents.flatten(0, 1)), dim=1)
    rounding = expected["logits"].float().abs() * 2**-11
    assert ((logits.view(2, 20, 4, 512) - expected["logits"].float()).abs() < 1e-3 + rounding).all()
    assert len(head.classifiers) == 4 and sum(converted.bookkeeping.values()) == 12 * 4


def test_the_layout_used_by_other_tests_is_that_of_the_research_code():
    with torch.device("meta"):
        made = research_depth_transformer(
            DepthTransformerHead(DepthTransformerConfig(96, 32, 512, 4, 128, 3, 8)), prefix=""
        )
    assert {name: list(tensor.shape) for name, tensor in made.items()} == read_layout(LAYOUT)
