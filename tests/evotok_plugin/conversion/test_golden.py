"""Converter and architecture against outputs of the research code."""

import pytest
import torch
from research_layout import research_tokenizer
from research_weights import GOLDEN, read_layout, research_weights, smooth_images
from safetensors.torch import load_file

from evotok_plugin import EvoTokConfig, EvoTokModel
from evotok_plugin.cli import main
from evotok_plugin.tokenizer_folder import open_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A research checkpoint that was pickled, converted by the command line and loaded."""
    folder = tmp_path_factory.mktemp("golden")
    weights = research_weights("tokenizer_layout")
    checkpoint = folder / "research.pt"
    torch.save({"ema": {name: torch.from_numpy(value) for name, value in weights.items()}, "steps": 7}, checkpoint)
    assert main(["convert", str(checkpoint), str(folder / "evotok")]) == 0
    checkpoint.unlink()
    model, processor = open_tokenizer(str(folder / "evotok"), "cpu")
    assert processor.size == 256 and model.config.encoder_num_layers == 2 and model.config.codebook_size == 512
    return model


@torch.no_grad()
def test_outputs_equal_those_of_the_research_code(tokenizer):
    model, expected = tokenizer, load_file(GOLDEN / "tokenizer.safetensors")
    pixels = ((torch.from_numpy(smooth_images()) + 1) * 127.5).clamp(0, 255) / 255
    pixel_values = (pixels - 0.5) / 0.5

    hidden = model.encoder.features(pixel_values)
    torch.testing.assert_close(hidden[:, ::32], expected["hidden_states"].float(), atol=2e-2, rtol=2e-2)  # float16
    encoded = model.encode(pixel_values)
    torch.testing.assert_close(encoded.latents[:, ::4], expected["latents"], atol=1e-4, rtol=0)
    assert torch.equal(encoded.codes, expected["codes"].long())
    for depth, name in ((4, "pixel_latents"), (16, "semantic_latents")):
        latents = model.codes_to_latents(encoded.codes[..., :depth])
        torch.testing.assert_close(latents[:, ::4], expected[name], atol=1e-4, rtol=0)
    for value, name in (
        (model.decode_semantics(encoded.codes)[:, ::16], "semantic_features"),
        (model.decode_pixels(encoded.codes[..., :4])[:, :, ::8, ::8], "reconstruction"),
    ):
        relative = (value - expected[name].float()).norm() / expected[name].float().norm()
        assert relative < 1e-3, f"{name}: relative error {relative:.2e}"
    loss = model.quantizer(encoded.latents).commitment_loss
    torch.testing.assert_close(loss, expected["commitment_loss"][0], atol=1e-4, rtol=1e-3)


def test_the_layout_used_by_other_tests_is_that_of_the_research_code():
    """Compares every name and shape from `research_layout`, which creates checkpoints of other sizes."""
    with torch.device("meta"):
        model = EvoTokModel(EvoTokConfig.preset("paper", encoder_num_layers=2, codebook_size=512))
        made = {name: list(t.shape) for name, t in research_tokenizer(model, usage_rows=131072).items()}
    assert made == read_layout("tokenizer_layout")
