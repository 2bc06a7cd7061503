"""Our models in the layout of research checkpoints, written independently of the converters that the tests check."""

import torch

SIGLIP_PARTS = (
    "layer_norm1", "self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj", "layer_norm2",
    "mlp.fc1", "mlp.fc2",
)  # fmt: skip


class Layout(dict):
    """A research state dict that is filled from one of our modules."""

    def __init__(self, module):
        super().__init__()
        self.ours = {name: tensor.clone() for name, tensor in module.state_dict().items()}

    def copy(self, theirs, ours, leaves=("weight", "bias")):
        for leaf in leaves:
            self[f"{theirs}.{leaf}"] = self.ours[f"{ours}.{leaf}"]


def research_tokenizer(model, tower="encoder_vqkd.vision_model.", usage_rows=8):
    """All keys of a research tokenizer whose forward pass equals that of `model`."""
    config, out = model.config, Layout(model)
    layers = f"{tower}encoder.layers"
    out.copy(f"{tower}embeddings.patch_embedding", "encoder.embeddings.patch_embedding")
    out.copy(f"{tower}embeddings.position_embedding", "encoder.embeddings.position_embedding", ["weight"])
    for layer in range(config.encoder_num_layers):
        for part in SIGLIP_PARTS:
            out.copy(f"{layers}.{layer}.{part}", f"encoder.encoder.layers.{layer}.{part}")
    for part in SIGLIP_PARTS:  # the last layer, which is never run
        for leaf in ("weight", "bias"):
            shape = out[f"{layers}.0.{part}.{leaf}"].shape
            out[f"{layers}.{config.encoder_num_layers}.{part}.{leaf}"] = torch.randn(shape)
    width, mlp = config.encoder_hidden_size, config.encoder_intermediate_size
    unused = {
        "post_layernorm.weight": (width,), "post_layernorm.bias": (width,), "head.probe": (1, 1, width),
        "head.attention.in_proj_weight": (3 * width, width), "head.attention.in_proj_bias": (3 * width,),
        "head.attention.out_proj.weight": (width, width), "head.attention.out_proj.bias": (width,),
        "head.layernorm.weight": (width,), "head.layernorm.bias": (width,),
        "head.mlp.fc1.weight": (mlp, width), "head.mlp.fc1.bias": (mlp,),
        "head.mlp.fc2.weight": (width, mlp), "head.mlp.fc2.bias": (width,),
    }  # fmt: skip
    out.update({tower + name: torch.randn(shape) for name, shape in unused.items()})
    for index in (0, 2):
        out.copy(f"encode_task_layer.{index}", f"encoder.to_latent.{index}")
        out.copy(f"decode_task_layer.{index}", f"semantic_decoder.to_features.{index}")
    out["scaling_layer.shift"] = out["scaling_layer.scale"] = torch.full((1, 3, 1, 1), 0.5)
    out["quantize.codebook_used"] = torch.zeros(usage_rows, config.num_quantizers)
    for level, codebook in enumerate(out.ours["quantizer.codebooks"]):
        name = f"quantize.codebooks.{level}"
        out[f"{name}.weight"] = torch.cat([codebook, torch.zeros(1, config.codebook_dim)])
        out[f"{name}.cluster_size_ema"] = torch.ones(config.codebook_size)
        out[f"{name}.embed_ema"] = codebook
    _semantic_decoder(out, config)
    _pixel_decoder(out, config)
    return dict(out)


def _semantic_decoder(out, config):
    out["decoder_vqkd.cls_token"] = out.ours["semantic_decoder.class_token"]
    out["decoder_vqkd.pos_embed"] = out.ours["semantic_decoder.position_embedding"]
    out["decoder_vqkd.patch_embed.proj.weight"] = out.ours["semantic_decoder.from_latent.weight"][:, :, None, None]
    out["decoder_vqkd.patch_embed.proj.bias"] = out.ours["semantic_decoder.from_latent.bias"]
    out.copy("decoder_vqkd.fc_norm", "semantic_decoder.norm")
    for block in range(config.semantic_num_layers):
        theirs, ours = f"decoder_vqkd.blocks.{block}", f"semantic_decoder.blocks.{block}"
        parts = [out.ours[f"{ours}.attention.{part}.weight"] for part in ("query", "key", "value")]
        out[f"{theirs}.attn.qkv.weight"] = torch.cat(parts)
        out[f"{theirs}.attn.q_bias"] = out.ours[f"{ours}.attention.query.bias"]
        out[f"{theirs}.attn.v_bias"] = out.ours[f"{ours}.attention.value.bias"]
        out.copy(f"{theirs}.attn.proj", f"{ours}.attention.proj")
        out.copy(f"{theirs}.norm1", f"{ours}.norm_1")
        out.copy(f"{theirs}.norm2", f"{ours}.norm_2")
        out.copy(f"{theirs}.mlp.fc1", f"{ours}.mlp.0")
        out.copy(f"{theirs}.mlp.fc2", f"{ours}.mlp.2")


def _pixel_decoder(out, config):
    def residual(theirs, ours):
        for number in (1, 2):
            out.copy(f"{theirs}.norm{number}", f"{ours}.norm_{number}")
            out.copy(f"{theirs}.conv{number}", f"{ours}.conv_{number}")
        if f"{ours}.shortcut.weight" in out.ours:
            out.copy(f"{theirs}.nin_shortcut", f"{ours}.shortcut")

    def attention(theirs, ours):
        for short, long in (("norm", "norm"), ("q", "query"), ("k", "key"), ("v", "value"), ("proj_out", "proj")):
            out.copy(f"{theirs}.{short}", f"{ours}.{long}")

    out.copy("post_quant_conv", "pixel_decoder.from_latent")
    for name in ("conv_in", "norm_out", "conv_out"):
        out.copy(f"decoder.{name}", f"pixel_decoder.{name}")
    residual("decoder.mid.0", "pixel_decoder.middle.0")
    attention("decoder.mid.1", "pixel_decoder.middle.1")
    residual("decoder.mid.2", "pixel_decoder.middle.2")
    num_stages = len(config.decoder_channel_multipliers)
    for stage in range(num_stages):
        theirs, ours = f"decoder.conv_blocks.{stage}", f"pixel_decoder.stages.{stage}"
        for block in range(config.decoder_num_res_blocks + 1):
            residual(f"{theirs}.res.{block}", f"{ours}.blocks.{block}")
            if stage == 0:
                attention(f"{theirs}.attn.{block}", f"{ours}.attention.{block}")
        if stage < num_stages - 1:
            out.copy(f"{theirs}.upsample.conv", f"{ours}.upsample")


def research_depth_transformer(head, prefix="model.vision_tower.rqtransformer.", num_classifiers=16):
    """All keys of a research depth transformer whose forward pass equals that of `head`."""
    out = Layout(head)
    out["pos_emb_d"] = out.ours["level_embedding"][None]
    out.copy("in_mlp_1", "from_latent")
    out.copy("in_mlp_2", "from_hidden")
    for block in range(len(head.blocks)):
        theirs, ours = f"head_transformer.blocks.{block}", f"blocks.{block}"
        for leaf in ("weight", "bias"):
            query, key, value = out.ours[f"{ours}.qkv.{leaf}"].chunk(3)
            for part, tensor in (("query", query), ("key", key), ("value", value)):
                out[f"{theirs}.attn.{part}.{leaf}"] = tensor
        out.copy(f"{theirs}.attn.proj", f"{ours}.proj")
        out.copy(f"{theirs}.ln1", f"{ours}.norm_1")
        out.copy(f"{theirs}.ln2", f"{ours}.norm_2")
        for index in (0, 2):
            out.copy(f"{theirs}.mlp.{index}", f"{ours}.mlp.{index}")
    for level in range(num_classifiers):
        for index in (0, 1):
            out.copy(f"classifiers.{level}.{index}", f"classifiers.{min(level, head.num_levels - 1)}.{index}")
    return {prefix + name: tensor for name, tensor in out.items()}


def research_projector(projector):
    """The keys of a research projector file."""
    out = Layout(projector)
    out.copy("model.mm_projector.0", "linear_1")
    out.copy("model.mm_projector.2", "linear_2")
    return dict(out)
