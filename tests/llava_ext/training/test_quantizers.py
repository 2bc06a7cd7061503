"""A training step of the multimodal model on tokenizers with each kind of quantizer."""

import pytest
import torch
from stage_runs import run, run_forked, write_recipe

from evotok_plugin import EvoTokConfig, EvoTokImageProcessor, EvoTokModel
from llava_ext.model_folder import load_model, read_tower


@pytest.mark.parametrize("quantizer", ["simvq", "fsq"])
@pytest.mark.parametrize("head", ["depth", "flat"])
def test_a_step_trains_and_keeps_the_codes(quantizer, head, tiny_backbone_folder, scene_folder, tmp_path):
    torch.manual_seed(0)
    pixel_values = torch.rand(2, 3, 48, 48) * 2 - 1
    tokenizer = EvoTokModel(EvoTokConfig.preset("tiny", quantizer=quantizer)).eval()
    tokenizer.save_pretrained(tmp_path / "evotok")
    EvoTokImageProcessor(size=48).save_pretrained(tmp_path / "evotok")
    recipe = write_recipe(tmp_path, tiny_backbone_folder, tmp_path / "evotok", scene_folder)
    out = tmp_path / "out"
    run_forked(run, recipe, out, {"deepspeed": None, "max_steps": 1, "save_steps": 1, "image_head": head})
    model, _ = load_model(out)
    assert not list(model.vision_tower.quantizer.parameters())
    with torch.no_grad():
        expected = tokenizer.encode(pixel_values).codes
        assert torch.equal(model.vision_tower.encode(pixel_values).codes, expected)
    assert model.vision_tower.fingerprint() == read_tower(out).fingerprint() == tokenizer.fingerprint()
    codebooks = model.vision_tower.quantizer.codebooks
    assert torch.equal(codebooks, tokenizer.quantizer.codebooks)
    assert model.train().vision_tower.quantizer.codebooks is codebooks  # computed once
