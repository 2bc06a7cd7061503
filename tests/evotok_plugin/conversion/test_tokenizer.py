"""Conversion of research checkpoints made from small random models, and errors for everything that does not fit."""

import argparse
import json
import os

import pytest
import torch
from research_layout import research_depth_transformer, research_tokenizer
from safetensors.torch import load_file

from evotok_plugin import EvoTokConfig, EvoTokModel
from evotok_plugin.cli import main
from evotok_plugin.conversion.research_file import read_checkpoint
from evotok_plugin.tokenizer_folder import open_tokenizer

SMALL = {
    "image_size": 32, "patch_size": 8, "encoder_hidden_size": 64, "encoder_num_layers": 2, "encoder_num_heads": 1,
    "encoder_intermediate_size": 96, "codebook_dim": 6, "codebook_size": 20, "num_quantizers": 5, "pixel_depth": 4,
    "semantic_depth": 5, "pixel_latent_channels": 10, "decoder_channels": 32,
    "decoder_channel_multipliers": (1, 1, 2, 3), "decoder_num_res_blocks": 1, "semantic_hidden_size": 40,
    "semantic_num_layers": 1, "semantic_num_heads": 12, "semantic_head_dim": 3, "semantic_dim": 24,
}  # fmt: skip
# Sizes that differ from the conventions, so that some cannot be inferred from shapes.
OTHER = SMALL | {
    "image_size": 48, "patch_size": 4, "decoder_channel_multipliers": (2, 1, 4), "encoder_hidden_size": 30,
    "encoder_num_heads": 3, "encoder_num_layers": 1, "codebook_size": 7, "num_quantizers": 9, "pixel_depth": 2,
    "semantic_depth": 8, "semantic_num_heads": 5, "semantic_head_dim": 4, "decoder_channels": 8,
    "decoder_num_res_blocks": 0, "decoder_norm_groups": 4,
}  # fmt: skip
OTHER_FLAGS = [
    "--encoder_num_heads", "3", "--semantic_num_heads", "5", "--pixel_depth", "2", "--semantic_depth", "8",
    "--decoder_norm_groups", "4",
]  # fmt: skip


def random_model(sizes, seed=0):
    torch.manual_seed(seed)
    return EvoTokModel(EvoTokConfig(**sizes)).eval()


@pytest.fixture(scope="module")
def weights():
    return research_tokenizer(random_model(SMALL))


def convert(tmp_path, capsys, content, *flags):
    """Pickle `content` and run `evotok convert` on it; returns the exit code and the error line or output."""
    torch.save(content, tmp_path / "checkpoint.pt")
    code = main(["convert", str(tmp_path / "checkpoint.pt"), str(tmp_path / "out"), *flags])
    captured = capsys.readouterr()
    return code, captured.err.strip().splitlines()[-1] if code else captured.out


@pytest.mark.parametrize(
    ("sizes", "flags", "seed", "tower", "container"),
    [
        (SMALL, [], 1, "encoder_vqkd.vision_model.", "ema"),
        (SMALL, [], 2, "encoder_vqkd.", "model"),
        (OTHER, OTHER_FLAGS, 3, "encoder_vqkd.vision_model.", "state_dict"),
    ],
)
def test_a_model_is_restored_from_the_research_layout(tmp_path, capsys, sizes, flags, seed, tower, container):
    model = random_model(sizes, seed)
    content = {container: research_tokenizer(model, tower), "args": argparse.Namespace(lr=1e-4), "steps": 3}
    code, text = convert(tmp_path, capsys, content, *flags)
    assert code == 0 and f"{len(model.state_dict())} weights" in text, text
    loaded, processor = open_tokenizer(str(tmp_path / "out"), "cpu")
    assert processor.size == sizes["image_size"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["semantic_decoder_trained"] is True
    pixel_values = torch.rand(2, 3, *[sizes["image_size"]] * 2) * 2 - 1
    with torch.no_grad():
        for name, value in model(pixel_values).items():
            torch.testing.assert_close(value, loaded(pixel_values)[name])
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_first_container_present_is_used(tmp_path, weights):
    for index, names in enumerate((("ema", "model", "state_dict"), ("model", "state_dict"), ("state_dict",), ())):
        content = {name: {"weight": torch.full((1,), float(i))} for i, name in enumerate(names)}
        torch.save(content or {"weight": torch.zeros(1)}, tmp_path / f"{index}.pt")
        assert read_checkpoint(tmp_path / f"{index}.pt")["weight"] == 0


def test_half_precision_checkpoints_become_float32(tmp_path, capsys, weights):
    assert convert(tmp_path, capsys, {"ema": {name: tensor.half() for name, tensor in weights.items()}})[0] == 0
    model, _ = open_tokenizer(str(tmp_path / "out"), "cpu")
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}


def test_unused_layers_may_be_absent_and_are_counted_if_present(tmp_path, capsys, weights):
    last = "encoder_vqkd.vision_model.encoder.layers.2."
    unused = [name for name in weights if name.startswith(last) or ".head." in name or "post_layernorm" in name]
    code, text = convert(tmp_path, capsys, {"model": weights})
    assert code == 0 and f"left out: {len(unused)} keys, SigLIP layers after the features" in text
    pruned = {name: tensor for name, tensor in weights.items() if name not in unused}
    (tmp_path / "pruned").mkdir()
    assert convert(tmp_path / "pruned", capsys, {"model": pruned}, "--encoder_num_layers", "2")[0] == 0


def changed(weights, **changes):
    """A copy with some tensors replaced, or removed if the value is None."""
    return {name: tensor for name, tensor in (weights | changes).items() if tensor is not None}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"decoder.extra.weight": torch.zeros(2)}, "1 unknown: decoder.extra.weight"),
        ({"quantize.codebooks.3.weight": None}, "1 missing: quantize.codebooks.3.weight"),
        ({"decoder.conv_in.bias": None, "decoder.norm_out.bias": None},
         "2 missing: decoder.conv_in.bias, decoder.norm_out.bias"),
        ({"encode_task_layer.2.weight": None, "decoder_vqkd.cls_token": None},
         "2 missing: encode_task_layer.2.weight, decoder_vqkd.cls_token"),
        ({"decoder.conv_in.bias": torch.zeros(7)}, "decoder.conv_in.bias is (7,), expected (96,)"),
        ({"decoder_vqkd.blocks.0.attn.qkv.weight": torch.zeros(36, 40)},
         "decoder_vqkd.blocks.0.attn.qkv.weight is (36, 40), expected (108, 40)"),
        ({"quantize.codebooks.2.weight": torch.zeros(20, 6)},
         "quantize.codebooks.2.weight is (20, 6), expected (21, 6)"),
        ({"quantize.codebooks.2.weight": torch.ones(21, 6)}, "the last row of quantize.codebooks.2.weight is not zero"),
        ({"decoder_vqkd.cls_token": torch.zeros(40)}, "decoder_vqkd.cls_token is (40,), expected 3 dimensions"),
        ({"encoder_vqkd.vision_model.embeddings.position_embedding.weight": torch.zeros(15, 64)}, "square number"),
        ({"encoder_vqkd.embeddings.patch_embedding.bias": torch.zeros(64)},
         "1 unknown: encoder_vqkd.embeddings.patch_embedding.bias"),
        ({"scaling_layer.shift": torch.zeros(1, 3, 1, 1)}, "scaling_layer.shift is [0.0, 0.0, 0.0], expected 0.5"),
        ({"decoder.conv_in.bias": torch.zeros(7), "a": torch.zeros(1), "post_quant_conv.bias": None},
         "1 missing: post_quant_conv.bias; 1 unknown: a; 1 of another shape: decoder.conv_in.bias"),
    ],
)  # fmt: skip
def test_mismatched_keys_are_listed(tmp_path, capsys, weights, changes, expected):
    code, error = convert(tmp_path, capsys, {"ema": changed(weights, **changes)})
    assert code == 2 and error.startswith("error: ") and expected in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--pixel_depth", "6"], "pixel_depth must be in 1..5"),
        (["--encoder_num_heads", "5"], "not a multiple of 5 heads"),
        (["--semantic_num_heads", "5"], "semantic_num_heads 5 does not divide the attention's inner width 36"),
        (["--encoder_num_layers", "4"], "encoder.layers.3.layer_norm1.weight"),
        (["--decoder_norm_groups", "five"], "decoder_norm_groups: invalid literal"),
    ],
)
def test_invalid_options_are_explained(tmp_path, capsys, weights, flags, expected):
    code, error = convert(tmp_path, capsys, {"ema": weights}, *flags)
    assert code == 2 and error.startswith("error: ") and expected in error


def test_the_error_names_the_flag_for_heads_that_cannot_be_inferred(tmp_path, capsys):
    code, error = convert(tmp_path, capsys, {"ema": research_tokenizer(random_model(OTHER))})
    assert code == 2 and "the width 20, which is not a multiple of 64; set it with --semantic_num_heads" in error


class Code:
    """An object whose pickle runs a command when it is loaded unsafely."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_pickle_with_code_is_rejected_and_not_run(tmp_path, capsys, weights):
    code, error = convert(tmp_path, capsys, {"ema": weights, "optimizer": Code(tmp_path / "ran")})
    assert code == 2 and "is rejected: it holds" in error and "system" in error
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([1, 2], "expected a dict, got a list"),
        ({"a": 1}, "expected named tensors, or ema, model or state_dict, got 'a': int"),
        ({1: torch.zeros(1)}, "expected named tensors, or ema, model or state_dict, got 1: Tensor"),
        ({"ema": {"a": 1}, "model": {}}, "expected a dict of tensors in 'ema', got 'a': int"),
        ({"model": {}}, "expected a dict of tensors in 'model', got an empty dict"),
        ({"model": {"a": torch.zeros(1)}}, "sizes cannot be read; 10 missing: "),
    ],
)
def test_pickles_that_are_not_checkpoints_are_rejected(tmp_path, capsys, content, expected):
    code, error = convert(tmp_path, capsys, content)
    assert code == 2 and error.startswith("error: ") and expected in error


@pytest.mark.parametrize("content", [b"", b"hello, world", b"\x89PNG\r\n\x1a\n" + bytes(64), b"PK\x03\x04" + bytes(64)])
def test_other_files_are_rejected(tmp_path, capsys, content):
    (tmp_path / "file").write_bytes(content)
    assert main(["convert", str(tmp_path / "file"), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and "is not a checkpoint" in error
    assert main(["convert", str(tmp_path / "absent"), str(tmp_path / "out")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_the_error_for_files_of_the_mllm_names_the_right_command(tmp_path, capsys):
    from evotok_plugin import DepthTransformerConfig, DepthTransformerHead

    for content in (
        research_depth_transformer(DepthTransformerHead(DepthTransformerConfig(8, 4, 6, 2, 8, 1, 2))),
        {"model.mm_projector.0.weight": torch.zeros(2, 2)},
    ):
        code, error = convert(tmp_path, capsys, content)
        assert code == 2 and "convert it with `evotok-llava convert`" in error


def test_a_folder_that_is_not_empty_is_not_changed(tmp_path, capsys, weights):
    (tmp_path / "out").mkdir()
    assert convert(tmp_path, capsys, {"ema": weights})[0] == 0
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    code, error = convert(tmp_path, capsys, {"ema": weights})
    assert code == 2 and "is not empty" in error
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


def test_pickled_weights_are_rewritten_as_safetensors(tmp_path, capsys):
    weights = {"a": torch.randn(3, 4).T, "b": torch.arange(3)}
    weights["shared"] = weights["b"]
    torch.save({"state_dict": weights}, tmp_path / "weights.pth")
    assert main(["convert", str(tmp_path / "weights.pth"), str(tmp_path / "weights.safetensors")]) == 0
    assert "3 weights" in capsys.readouterr().out
    written = load_file(tmp_path / "weights.safetensors")
    assert all(torch.equal(written[name], value) for name, value in weights.items()) and len(written) == 3
    torch.save({"code": os.system}, tmp_path / "code.pth")
    assert main(["convert", str(tmp_path / "code.pth"), str(tmp_path / "code.safetensors")]) == 2
    assert "unpickling anything but tensors can run code" in capsys.readouterr().err
    assert not (tmp_path / "code.safetensors").exists()
