"""Backbones in other forms than a folder with one file of full-precision weights: GGUF, sharded, quantized."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from evotok_plugin.errors import UserError
from llava_ext.assembly import assemble
from llava_ext.backbone import open_backbone, open_backbone_config
from llava_ext.export.gguf import export_gguf
from llava_ext.model_folder import base_fingerprints, has_fingerprint, load_model, save_model
from llava_ext.training.build_model import build_model
from llava_ext.training.config import StageConfig


@pytest.fixture(scope="module")
def gguf_file(make_backbone, tiny_tokenizer_folder, tiny_evotok_folder, tmp_path_factory):
    """A GGUF file of a random llama, and the folder of the same model."""
    pytest.importorskip("gguf", reason="needs the package gguf: pip install 'evotok[gguf]'")
    folder = tmp_path_factory.mktemp("gguf")
    backbone = make_backbone(tiny_tokenizer_folder, folder / "backbone", "llama", initializer_range=0.2)
    model, processor = assemble(backbone, tiny_evotok_folder, 32, 2, 2, image_head="flat")
    save_model(model, folder / "flat")
    processor.save_pretrained(folder / "flat")
    export_gguf(folder / "flat", folder / "exported")
    return folder / "exported/model.gguf", folder / "flat"


def test_a_gguf_file_is_the_same_model_and_can_be_saved(gguf_file, tmp_path):
    file, flat = gguf_file
    opened = open_backbone(file)
    expected, processor = load_model(flat)
    ids = processor.tokenizer("a red ring and 12 squares", return_tensors="pt", add_special_tokens=False)["input_ids"]
    assert opened.tokenizer("a red ring and 12 squares")["input_ids"][-ids.shape[1] :] == ids[0].tolist()
    assert opened.tokenizer.chat_template == processor.tokenizer.chat_template
    with torch.no_grad():
        logits = opened.model.eval()(input_ids=ids).logits[..., :300]
        torch.testing.assert_close(logits, expected.eval()(input_ids=ids).logits[..., :300], rtol=1e-4, atol=1e-4)
    opened.model.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved/config.json").read_text())
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), opened.model.parameters(), strict=True))


def test_a_stage_starts_from_a_gguf_file(gguf_file, tiny_evotok_folder, tmp_path):
    file, _ = gguf_file
    config = StageConfig(
        model_name_or_path=str(file), vision_tower=str(tiny_evotok_folder), data_path="x.json",
        output_dir=str(tmp_path), use_cpu=True, head_hidden_size=32, head_num_layers=1, head_num_heads=2,
    )  # fmt: skip
    model, processor = build_model(config)
    save_model(model, tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    again, _ = load_model(tmp_path / "model")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_a_gguf_file_is_identified_by_its_content(gguf_file, tmp_path):
    file, _ = gguf_file
    known = base_fingerprints(file)
    copy = shutil.copy(file, tmp_path / "copy.gguf")
    assert has_fingerprint(copy, known)
    with open(copy, "ab") as changed:
        changed.write(b"x")
    assert not has_fingerprint(copy, known)


def test_gguf_sources_that_cannot_be_opened(gguf_file, tmp_path):
    file, _ = gguf_file
    with pytest.raises(UserError, match="does not exist"):
        open_backbone_config(tmp_path / "missing.gguf")
    (tmp_path / "broken.gguf").write_bytes(file.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"broken.gguf cannot be loaded: .*; pass the whole file"):
        open_backbone(tmp_path / "broken.gguf")
    with pytest.raises(UserError, match=r"has no config.json; pass a GGUF file itself: .*broken.gguf"):
        open_backbone(tmp_path)
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match=r"is a file; pass the folder"):
        open_backbone(tmp_path / "model.bin")
    with pytest.raises(UserError, match="cannot be quantized again; leave out --bits 4"):
        open_backbone(file, quantization_config=BitsAndBytesConfig(load_in_4bit=True))


def test_a_sharded_folder_is_the_same_model(tiny_backbone_folder, tiny_evotok_folder, tmp_path):
    whole = AutoModelForCausalLM.from_pretrained(tiny_backbone_folder)
    whole.save_pretrained(tmp_path, max_shard_size="40KB")
    AutoTokenizer.from_pretrained(tiny_backbone_folder).save_pretrained(tmp_path)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    opened = open_backbone(tmp_path).model
    assert all(torch.equal(a, b) for a, b in zip(opened.parameters(), whole.parameters(), strict=True))
    shards[0].unlink()
    with pytest.raises(UserError, match=shards[0].name):
        open_backbone(tmp_path)


@pytest.fixture
def four_bit_folder(tiny_backbone_folder, tmp_path):
    """The tiny backbone with NF4 weights, as bitsandbytes saves it."""
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'evotok[quant]'")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        tiny_backbone_folder, quantization_config=settings, dtype=torch.float32, device_map="cpu"
    )
    model.save_pretrained(tmp_path / "nf4")
    AutoTokenizer.from_pretrained(tiny_backbone_folder).save_pretrained(tmp_path / "nf4")
    return tmp_path / "nf4"


def test_a_folder_of_4_bit_weights_is_dequantized(four_bit_folder, tiny_backbone_folder, tiny_evotok_folder):
    stored = json.loads((four_bit_folder / "config.json").read_text())
    assert stored["quantization_config"]["load_in_4bit"]
    opened = open_backbone(four_bit_folder).model
    weights = dict(opened.named_parameters())
    original = dict(AutoModelForCausalLM.from_pretrained(tiny_backbone_folder).named_parameters())
    assert weights.keys() == original.keys() and {value.dtype for value in weights.values()} == {torch.float32}
    name = "model.layers.0.mlp.up_proj.weight"
    error = (weights[name] - original[name]).norm() / original[name].norm()
    assert 0.01 < error < 0.2  # the rounding of 4 bits
    assert not hasattr(opened.config, "quantization_config")
    model, _ = assemble(four_bit_folder, tiny_evotok_folder, 32, 2, 2)
    assert torch.equal(model.language_model.layers[0].mlp.up_proj.weight, weights[name])


def test_quantized_weights_are_not_quantized_again(four_bit_folder):
    with pytest.raises(UserError, match="holds quantized weights, which cannot be quantized again"):
        open_backbone(four_bit_folder, quantization_config=BitsAndBytesConfig(load_in_4bit=True))


def test_weights_of_an_unknown_quantization_are_an_error(four_bit_folder):
    stored = json.loads((four_bit_folder / "config.json").read_text())
    stored["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (four_bit_folder / "config.json").write_text(json.dumps(stored))
    with pytest.raises(UserError, match="quantized with awq, which .* full-precision weights"):
        open_backbone(four_bit_folder)
