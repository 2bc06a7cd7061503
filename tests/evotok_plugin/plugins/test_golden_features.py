"""The features that the tests inside LLaVA's environments compare with: those of the included model today."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from evotok_plugin.plugins.vision_tower import EvoTokVisionModel

ROOT = Path(__file__).resolve().parents[3]


@torch.no_grad()
def test_golden_features_are_those_of_the_included_model():
    tower = EvoTokVisionModel.from_pretrained(ROOT / "llava_ext" / "pretrained" / "scenes").eval()
    expected = load_file(ROOT / "tests" / "golden" / "tower_features.safetensors")["features"]
    pixel_values = torch.arange(2 * 3 * 48 * 48).mul(7919).remainder(256).view(2, 3, 48, 48) / 127.5 - 1
    torch.testing.assert_close(tower(pixel_values).last_hidden_state, expected, atol=1e-4, rtol=1e-4)
