"""Assembly of a model from a text backbone and an image tokenizer."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from evotok_plugin.errors import UserError
from llava_ext.assembly import assemble
from llava_ext.processing_evotok_llava import IMAGE_TOKENS


def test_new_tokens_are_initialized_near_the_mean_and_differ(tiny_backbone_folder, tiny_mllm):
    model, processor = tiny_mllm
    before = load_file(tiny_backbone_folder / "model.safetensors")["model.embed_tokens.weight"]
    added = range(len(before), len(processor.tokenizer))
    ids = [*processor.tokenizer.convert_tokens_to_ids(list(IMAGE_TOKENS)), *added]
    weight = model.get_input_embeddings().weight
    others = torch.ones(len(weight), dtype=torch.bool)
    others[ids] = False
    distances = (weight[ids] - weight[others].mean(0)) / weight[others].std(0)
    assert distances.abs().max() < 0.5 and len(torch.unique(weight[ids], dim=0)) == len(ids)


def test_assembly_rejects_incomplete_parts(tiny_backbone_folder, tiny_evotok_folder, tmp_path):
    def changed(folder, name, drop):
        copy = shutil.copytree(folder, tmp_path / name)
        weights = {key: value for key, value in load_file(copy / "model.safetensors").items() if drop not in key}
        save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
        return copy

    backbone = changed(tiny_backbone_folder, "backbone", "layers.1.mlp.up_proj")
    with pytest.raises(UserError, match=r"1 missing \(model.layers.1.mlp.up_proj.weight\)"):
        assemble(backbone, tiny_evotok_folder, 32, 2, 2)
    with pytest.raises(UserError, match=r"missing \(semantic_decoder"):
        assemble(tiny_backbone_folder, changed(tiny_evotok_folder, "evotok", "semantic_decoder."), 32, 2, 2)


def test_assembly_rejects_a_tokenizer_without_a_trained_semantic_decoder(
    tiny_backbone_folder, tiny_evotok_folder, tmp_path
):
    tower = shutil.copytree(tiny_evotok_folder, tmp_path / "tower")
    config = json.loads((tower / "config.json").read_text())
    (tower / "config.json").write_text(json.dumps(config | {"semantic_decoder_trained": False}))
    with pytest.raises(UserError, match="semantic decoder of .*tower' was not trained"):
        assemble(tiny_backbone_folder, tower, 32, 2, 2)
