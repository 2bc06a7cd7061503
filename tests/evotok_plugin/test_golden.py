"""The converter and the architecture against outputs of the research code, where those are at hand."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from research_layout import research_tokenizer
from safetensors.torch import load_file

from evotok_plugin import EvoTokConfig, EvoTokModel
from evotok_plugin.cli import main
from evotok_plugin.commands.shared import open_tokenizer

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason="research outputs (../shared/golden) are not here")


def stand_in():
    spec = importlib.util.spec_from_file_location("stand_in_weights", GOLDEN / "stand_in_weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A research checkpoint, a real pickle, through the command line and `from_pretrained`."""
    folder = tmp_path_factory.mktemp("golden")
    weights = stand_in().state_dict(GOLDEN / "tokenizer_keys.json")
    checkpoint = folder / "research.pt"
    torch.save({"ema": {name: torch.from_numpy(value) for name, value in weights.items()}, "steps": 7}, checkpoint)
    assert main(["convert", str(checkpoint), str(folder / "evotok")]) == 0
    checkpoint.unlink()
    model, processor = open_tokenizer(str(folder / "evotok"), "cpu")
    assert processor.size == 256 and model.config.encoder_num_layers == 2 and model.config.codebook_size == 512
    return model


@torch.no_grad()
def test_outputs_equal_those_of_the_research_code(tokenizer):
    model, expected = tokenizer, load_file(GOLDEN / "tokenizer_expected.safetensors")
    pixels = ((torch.from_numpy(stand_in().images()) + 1) * 127.5).clamp(0, 255) / 255
    pixel_values = (pixels - 0.5) / 0.5

    hidden = model.encoder.features(pixel_values)
    torch.testing.assert_close(hidden[:, ::8], expected["hidden"].float(), atol=2e-2, rtol=2e-2)  # stored as float16
    encoded = model.encode(pixel_values)
    torch.testing.assert_close(encoded.latents, expected["latent"].view(2, 256, 32), atol=1e-4, rtol=0)
    assert torch.equal(encoded.codes, expected["codes"].view(2, 256, 16).long())
    for depth, name in ((4, "pixel_quantized"), (16, "semantic_quantized")):
        latents = model.codes_to_latents(encoded.codes[..., :depth])
        torch.testing.assert_close(latents.transpose(1, 2).reshape(2, 32, 16, 16), expected[name], atol=1e-4, rtol=0)
    for value, name in (
        (model.decode_semantics(encoded.codes)[:, ::4], "semantic_features"),
        (model.decode_pixels(encoded.codes[..., :4])[:, :, ::2, ::2], "reconstruction"),
    ):
        relative = (value - expected[name].float()).norm() / expected[name].float().norm()
        assert relative < 1e-3, f"{name}: relative error {relative:.2e}"
    loss = model.quantizer(encoded.latents).commitment_loss
    torch.testing.assert_close(loss, expected["commitment_loss"][0], atol=1e-4, rtol=1e-3)


def test_the_layout_of_the_other_tests_is_the_research_code_s():
    """Every name and shape of `research_layout`, by which checkpoints of other sizes are made."""
    with torch.device("meta"):
        model = EvoTokModel(EvoTokConfig.preset("paper", encoder_num_layers=2, codebook_size=512))
        made = {name: list(t.shape) for name, t in research_tokenizer(model, usage_rows=131072).items()}
    assert made == json.loads((GOLDEN / "tokenizer_keys.json").read_text())
