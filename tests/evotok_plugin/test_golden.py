"""The architecture against outputs of the research code, where those are at hand."""

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from evotok_plugin import EvoTokConfig, EvoTokModel

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason="research outputs (../shared/golden) are not here")


def research_state_dict():
    spec = importlib.util.spec_from_file_location("stand_in_weights", GOLDEN / "stand_in_weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    weights = module.state_dict(GOLDEN / "tokenizer_keys.json")
    return {name: torch.from_numpy(value) for name, value in weights.items()}, torch.from_numpy(module.images())


def ours(theirs):
    """Names of a research checkpoint to ours; None for what has no part in the forward pass."""
    unused = ("scaling_layer.", "quantize.codebook_used", "encoder_vqkd.vision_model.head.")
    if theirs.startswith(unused) or "_ema" in theirs or "post_layernorm" in theirs or "encoder.layers.2." in theirs:
        return None
    renames = [
        ("encoder_vqkd.vision_model.embeddings.", "encoder.embeddings."),
        ("encoder_vqkd.vision_model.encoder.", "encoder.encoder."),
        ("encode_task_layer.", "encoder.to_latent."),
        ("decode_task_layer.", "semantic_decoder.to_features."),
        ("decoder_vqkd.cls_token", "semantic_decoder.class_token"),
        ("decoder_vqkd.pos_embed", "semantic_decoder.position_embedding"),
        ("decoder_vqkd.patch_embed.proj.", "semantic_decoder.from_latent."),
        ("decoder_vqkd.fc_norm.", "semantic_decoder.norm."),
        ("decoder_vqkd.blocks.", "semantic_decoder.blocks."),
        (".mlp.fc1.", ".mlp.0."), (".mlp.fc2.", ".mlp.2."), (".attn.proj.", ".attention.proj."),
        ("post_quant_conv.", "pixel_decoder.from_latent."),
        ("decoder.conv_blocks.", "pixel_decoder.stages."),
        ("decoder.mid.", "pixel_decoder.middle."),
        ("decoder.", "pixel_decoder."),
        (".res.", ".blocks."), (".upsample.conv.", ".upsample."), (".nin_shortcut.", ".shortcut."),
        (".proj_out.", ".proj."), (".norm1.", ".norm_1."), (".norm2.", ".norm_2."),
        (".conv1.", ".conv_1."), (".conv2.", ".conv_2."),
    ]  # fmt: skip
    name = theirs
    if theirs.startswith("encoder_vqkd."):
        renames = renames[:2]  # SigLIP's own names stay
    if theirs.startswith("decoder."):
        for short, long in ((".q.", ".query."), (".k.", ".key."), (".v.", ".value.")):
            name = name.replace(short, long)
        name = name.replace(".attn.", ".attention.")
    for old, new in renames:
        if old == "decoder." and not name.startswith("decoder."):
            continue
        name = name.replace(old, new, 1)
    return name


def convert(weights):
    state, codebooks = {}, {}
    for theirs, value in weights.items():
        if theirs.startswith("quantize.codebooks.") and theirs.endswith(".weight"):
            codebooks[int(theirs.split(".")[2])] = value[:-1]  # the last row is padding
            continue
        if ".attn.q_bias" in theirs or ".attn.v_bias" in theirs:
            name = (
                ours(theirs)
                .replace(".attn.q_bias", ".attention.query.bias")
                .replace(".attn.v_bias", ".attention.value.bias")
            )
            state[name] = value
            continue
        if ".attn.qkv.weight" in theirs:
            for part, piece in zip(("query", "key", "value"), value.chunk(3), strict=True):
                state[ours(theirs).replace(".attn.qkv.", f".attention.{part}.")] = piece
            continue
        name = ours(theirs)
        if name is not None:
            state[name] = value.flatten(1) if name.startswith("semantic_decoder.from_latent.w") else value
    state["quantizer.codebooks"] = torch.stack([codebooks[level] for level in range(16)])
    return state


@torch.no_grad()
def test_outputs_equal_those_of_the_research_code():
    weights, images = research_state_dict()
    model = EvoTokModel(EvoTokConfig.preset("paper", encoder_num_layers=2, codebook_size=512)).eval()
    model.load_state_dict(convert(weights))
    expected = load_file(GOLDEN / "tokenizer_expected.safetensors")
    pixels = ((images + 1) * 127.5).clamp(0, 255) / 255
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
    loss = model(pixel_values).commitment_loss
    torch.testing.assert_close(loss, expected["commitment_loss"][0], atol=1e-4, rtol=1e-3)
