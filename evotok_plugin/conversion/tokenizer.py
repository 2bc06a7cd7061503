"""Conversion of research tokenizers: every key is either mapped or listed as bookkeeping, all others are errors.

The research layout is a pickle with `ema`, `model` or `state_dict`. Its encoder is a complete SigLIP vision tower, of
which we run all layers but the last; each codebook ends with a padding row of zeros; query, key and value weights of
the semantic decoder are one matrix, with separate biases.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from evotok_plugin.common.folders import check_new_folder, write_whole_folder
from evotok_plugin.configuration_evotok import EvoTokConfig
from evotok_plugin.conversion.accounting import Shapes, Source, conventional_heads, convert_weights, rename
from evotok_plugin.conversion.options import TokenizerOptions
from evotok_plugin.conversion.research_file import looks_like_adapters, read_checkpoint
from evotok_plugin.errors import UserError
from evotok_plugin.image_processing_evotok import EvoTokImageProcessor
from evotok_plugin.modeling_evotok import EvoTokModel

_ATTENTION = (r"\.query\.", ".q."), (r"\.key\.", ".k."), (r"\.value\.", ".v."), (r"\.proj\.", ".proj_out.")
_RENAMES = {
    "encoder": (
        (r"^encoder\.to_latent\.", "encode_task_layer."),
        (r"^encoder\.(embeddings|encoder)\.", r"{tower}\1."),
    ),
    "pixel_decoder": (
        (r"^pixel_decoder\.from_latent\.", "post_quant_conv."),
        (r"^pixel_decoder\.", "decoder."),
        (r"\.middle\.", ".mid."),
        (r"\.stages\.(\d+)\.blocks\.", r".conv_blocks.\1.res."),
        (r"\.stages\.(\d+)\.attention\.", r".conv_blocks.\1.attn."),
        (r"\.stages\.(\d+)\.upsample\.", r".conv_blocks.\1.upsample.conv."),
        (r"\.(norm|conv)_([12])\.", r".\1\2."),
        (r"\.shortcut\.", ".nin_shortcut."),
        *_ATTENTION,
    ),
    "semantic_decoder": (
        (r"^semantic_decoder\.to_features\.", "decode_task_layer."),
        (r"^semantic_decoder\.", "decoder_vqkd."),
        (r"\.class_token$", ".cls_token"),
        (r"\.position_embedding$", ".pos_embed"),
        (r"\.from_latent\.", ".patch_embed.proj."),
        (r"^decoder_vqkd\.norm\.", "decoder_vqkd.fc_norm."),
        (r"\.norm_([12])\.", r".norm\1."),
        (r"\.attention\.(q|v)(uery|alue)\.bias$", r".attn.\1_bias"),
        (r"\.attention\.(query|key|value)\.weight$", ".attn.qkv.weight"),
        (r"\.attention\.", ".attn."),
        (r"\.mlp\.0\.", ".mlp.fc1."),
        (r"\.mlp\.2\.", ".mlp.fc2."),
    ),
}


def _tower_prefix(weights: Iterable[str]) -> str:
    """Prefix of SigLIP's names: older versions of transformers include `vision_model.`, newer ones do not."""
    old = "encoder_vqkd.vision_model."
    return old if any(name.startswith(old) for name in weights) else "encoder_vqkd."


def infer_config(weights: Mapping[str, Tensor], options: TokenizerOptions | None = None) -> EvoTokConfig:
    """Infer the configuration of a research tokenizer from the shapes of its weights and from options.

    Raises:
        UserError: a size cannot be inferred, or sizes contradict each other.
    """
    options = options or TokenizerOptions()
    tower, shapes = _tower_prefix(weights), Shapes(weights)
    named_shapes = {
        "patches": (f"{tower}embeddings.patch_embedding.weight", 4),
        "positions": (f"{tower}embeddings.position_embedding.weight", 2),
        "encoder_mlp": (f"{tower}encoder.layers.0.mlp.fc1.weight", 2),
        "to_latent": ("encode_task_layer.2.weight", 2),
        "codebook": ("quantize.codebooks.0.weight", 2),
        "post_quant": ("post_quant_conv.weight", 4),
        "class_token": ("decoder_vqkd.cls_token", 3),
        "attention_proj": ("decoder_vqkd.blocks.0.attn.proj.weight", 2),
        "to_features": ("decode_task_layer.2.weight", 2),
    }
    num_stages = max(1, shapes.count("decoder.conv_blocks."))
    stages = [f"decoder.conv_blocks.{stage}.res.0.conv1.weight" for stage in range(num_stages)]
    shapes.require([name for name, _ in named_shapes.values()] + stages)
    shape = {what: shapes.of(name, num_dims) for what, (name, num_dims) in named_shapes.items()}
    hidden, channels, patch, _ = shape["patches"]
    positions = shape["positions"][0]
    grid = math.isqrt(positions)
    if grid * grid != positions:
        raise UserError(
            f"{named_shapes['positions'][0]} has {positions} rows, expected a square number: one row per position of a "
            "square image"
        )
    upsampling = 2 ** (num_stages - 1)
    if patch != upsampling:
        raise UserError(
            f"the checkpoint's patches are {patch} pixels wide, but its decoder, with {num_stages} resolutions, "
            f"upsamples {upsampling} times; only checkpoints for which both are equal can be converted, because no "
            "tensor shows how the research code bridges the difference"
        )
    widths = [shapes.of(name, 4)[0] for name in stages]  # coarsest first
    finest = math.gcd(*widths)
    semantic_width, inner = shape["class_token"][2], shape["attention_proj"][1]
    semantic_heads = options.semantic_num_heads or _semantic_heads(semantic_width, inner)
    if inner % semantic_heads:
        raise UserError(f"semantic_num_heads {semantic_heads} does not divide the attention's inner width {inner}")
    num_quantizers = shapes.count("quantize.codebooks.")
    num_layers = options.encoder_num_layers or shapes.count(f"{tower}encoder.layers.") - 1
    if num_layers < 1:
        raise UserError(
            "the checkpoint's encoder has one layer, expected at least two, because the last one is never run "
            "(set the number of layers to run with --encoder_num_layers)"
        )
    return EvoTokConfig(
        image_size=grid * patch,
        patch_size=patch,
        num_channels=channels,
        encoder_hidden_size=hidden,
        encoder_num_layers=num_layers,
        encoder_num_heads=options.encoder_num_heads or conventional_heads(hidden, "--encoder_num_heads"),
        encoder_intermediate_size=shape["encoder_mlp"][0],
        codebook_dim=shape["to_latent"][0],
        codebook_size=shape["codebook"][0] - 1,  # the last row is padding
        num_quantizers=num_quantizers,
        pixel_depth=options.pixel_depth,
        semantic_depth=options.semantic_depth or num_quantizers,
        pixel_latent_channels=shape["post_quant"][0],
        decoder_channels=finest,
        decoder_channel_multipliers=[width // finest for width in reversed(widths)],
        decoder_num_res_blocks=shapes.count("decoder.conv_blocks.0.res.") - 1,
        decoder_norm_groups=options.decoder_norm_groups,
        semantic_hidden_size=semantic_width,
        semantic_num_layers=shapes.count("decoder_vqkd.blocks."),
        semantic_num_heads=semantic_heads,
        semantic_head_dim=inner // semantic_heads,
        semantic_dim=shape["to_features"][0],
    )


def _semantic_heads(width: int, inner: int) -> int:
    if inner == 12 * (width // 12):
        return 12
    return conventional_heads(inner, "--semantic_num_heads")


def _join_codebooks(tensors: Sequence[Tensor]) -> Tensor:
    """Stack one codebook (K + 1, C) per level to (L, K, C), without the padding rows."""
    for level, codebook in enumerate(tensors):
        if codebook[-1].any():
            raise UserError(
                f"the last row of quantize.codebooks.{level}.weight is not zero; expected a padding row after the codes"
            )
    return torch.stack([codebook[:-1] for codebook in tensors])


def _third(index: int, tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0].chunk(3)[index]


def _without_kernel(tensors: Sequence[Tensor]) -> Tensor:
    """Convert a 1x1 convolution (D, C, 1, 1) to a matrix (D, C)."""
    return tensors[0].flatten(1)


def _tokenizer_sources(config: EvoTokConfig, tower: str) -> dict[str, Source]:
    with torch.device("meta"):
        ours = EvoTokModel(config).state_dict()
    sources = {}
    for name, tensor in ours.items():
        part, shape = name.split(".")[0], tuple(tensor.shape)
        if name == "quantizer.codebooks":
            levels, codes, dims = shape
            books = tuple(f"quantize.codebooks.{level}.weight" for level in range(levels))
            sources[name] = Source(books, (codes + 1, dims), _join_codebooks)
            continue
        theirs = rename(name, _RENAMES[part]).replace("{tower}", tower)
        if theirs.endswith(".qkv.weight"):
            index = ("query", "key", "value").index(name.split(".")[-2])
            sources[name] = Source((theirs,), (3 * shape[0], shape[1]), partial(_third, index))
        elif theirs == "decoder_vqkd.patch_embed.proj.weight":
            sources[name] = Source((theirs,), (*shape, 1, 1), _without_kernel)
        else:
            sources[name] = Source((theirs,), shape)
    return sources


def _tokenizer_bookkeeping(weights: Mapping[str, Tensor], config: EvoTokConfig, tower: str) -> dict[str, str]:
    at = re.escape(tower)
    later = range(config.encoder_num_layers, Shapes(weights).count(f"{tower}encoder.layers."))
    unused = "SigLIP layers after the features"
    return {
        r"quantize\.codebook_used": "code usage counts",
        r"quantize\.codebooks\.\d+\.(cluster_size_ema|embed_ema)": "learning state of the codebooks",
        r"scaling_layer\.(shift|scale)": "image scaling, done by the image processor",
        rf"{at}embeddings\.position_ids": "position indices",
        rf"{at}(post_layernorm|head)\..+": unused,
        rf"{at}encoder\.layers\.({'|'.join(map(str, later)) or 'none'})\..+": unused,
    }


@dataclass(frozen=True)
class ConvertedTokenizer:
    """Configuration and weights for `EvoTokModel`, and the number of research keys left out for each reason."""

    config: EvoTokConfig
    state: dict[str, Tensor]
    bookkeeping: Counter[str]


def convert_tokenizer(weights: Mapping[str, Tensor], options: TokenizerOptions | None = None) -> ConvertedTokenizer:
    """Map the weights of a research tokenizer.

    Raises:
        UserError: keys are missing, unknown or of another shape, the file belongs to an MLLM, or images are scaled
            differently.
    """
    if looks_like_adapters(weights):
        raise UserError(
            "the file holds the depth transformer or a projector of the MLLM, not a tokenizer; convert it with "
            "`evotok-llava convert`"
        )
    config, tower = infer_config(weights, options), _tower_prefix(weights)
    converted = convert_weights(
        weights, _tokenizer_sources(config, tower), _tokenizer_bookkeeping(weights, config, tower)
    )
    for name in ("scaling_layer.shift", "scaling_layer.scale"):
        if name in weights and not (weights[name] == 0.5).all():
            raise UserError(
                f"{name} is {weights[name].flatten().tolist()}, expected 0.5 everywhere, for images in [-1, 1]"
            )
    return ConvertedTokenizer(config, converted.state, converted.bookkeeping)


def convert_checkpoint(
    checkpoint: str | Path, output: str | Path, options: TokenizerOptions | None = None
) -> ConvertedTokenizer:
    """Convert a research checkpoint to a folder for `EvoTokModel.from_pretrained`, with its image processor.

    Raises:
        UserError: the checkpoint cannot be read or does not match the research layout, or the output folder is not
            empty.
    """
    check_new_folder(output)
    converted = convert_tokenizer(read_checkpoint(checkpoint), options)

    def write(folder: Path) -> None:
        with torch.device("meta"):  # no memory for weights, which are passed on saving
            model = EvoTokModel(converted.config)
        model.save_pretrained(folder, state_dict=dict(converted.state))  # a copy, because the dict is emptied
        EvoTokImageProcessor(size=converted.config.image_size).save_pretrained(folder)

    write_whole_folder(output, write)
    return converted
