"""Research checkpoints of EvoTok to ours: every key is mapped or named as bookkeeping, anything else is an error.

The research layout: a pickle with `ema`, `model` or `state_dict`; the encoder is a whole SigLIP vision tower (we run
its layers but the last); a codebook has one more row than codes, a zero padding row; query, key and value of the
semantic decoder are one matrix with biases beside it.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from evotok_plugin.common.folders import check_new_folder, write_whole_folder
from evotok_plugin.configuration_evotok import EvoTokConfig
from evotok_plugin.conversion.accounting import Shapes, Source, conventional_heads, convert_weights, rename
from evotok_plugin.conversion.research_file import looks_like_adapters, read_checkpoint
from evotok_plugin.errors import UserError
from evotok_plugin.image_processing_evotok import EvoTokImageProcessor
from evotok_plugin.modeling_evotok import EvoTokModel

# Reading -----------------------------------------------------------------------------------------------------


# Accounting --------------------------------------------------------------------------------------------------


# The tokenizer -----------------------------------------------------------------------------------------------

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


def _option(text: str, default: int | None = None):
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class TokenizerOptions:
    """What the shapes of a tokenizer checkpoint do not tell; None takes the convention."""

    encoder_num_layers: int | None = _option("SigLIP layers to run (all in the file but the last)")
    encoder_num_heads: int | None = _option("SigLIP's heads (of 64 dimensions; 16 where SigLIP is 1152 wide)")
    semantic_num_heads: int | None = _option(
        "the semantic decoder's heads (12 where its inner width is 12 * (width // 12), else of 64 dimensions)"
    )
    pixel_depth: int = _option("levels summed for pixels (4)", 4)
    semantic_depth: int | None = _option("levels summed for features (all)")
    decoder_norm_groups: int = _option("groups of the pixel decoder's GroupNorm (32)", 32)


def _tower_prefix(weights: Iterable[str]) -> str:
    """Where SigLIP's names begin: older transformers wrote `vision_model.` before them, newer ones do not."""
    old = "encoder_vqkd.vision_model."
    return old if any(name.startswith(old) for name in weights) else "encoder_vqkd."


def infer_config(weights: Mapping[str, Tensor], options: TokenizerOptions | None = None) -> EvoTokConfig:
    """The configuration of a research tokenizer, from the shapes of its weights and from options.

    Raises:
        UserError: a size that cannot be read, or sizes that do not go together.
    """
    options = options or TokenizerOptions()
    tower, shapes = _tower_prefix(weights), Shapes(weights)
    telling = {
        "patches": (f"{tower}embeddings.patch_embedding.weight", 4),
        "places": (f"{tower}embeddings.position_embedding.weight", 2),
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
    shapes.require([name for name, _ in telling.values()] + stages)
    shape = {what: shapes.of(name, num_dims) for what, (name, num_dims) in telling.items()}
    hidden, channels, patch, _ = shape["patches"]
    positions = shape["places"][0]
    grid = math.isqrt(positions)
    if grid * grid != positions:
        raise UserError(
            f"{telling['places'][0]} has {positions} rows, expected a square number: one a position of a square image"
        )
    enlarged = 2 ** (num_stages - 1)
    if patch != enlarged:
        raise UserError(
            f"the checkpoint's patches are {patch} pixels wide, but the {num_stages} resolutions of its decoder "
            f"enlarge {enlarged} times; how the research code brings one to the other stands in no tensor, so only "
            "patches as wide as the decoder enlarges can be converted"
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
            "the checkpoint's encoder has one layer; the last one is never run, so at least two are expected "
            "(--encoder_num_layers names how many to run)"
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
    """Codebooks (K + 1, C) a level to (L, K, C), without the padding rows."""
    for level, codebook in enumerate(tensors):
        if codebook[-1].any():
            raise UserError(
                f"the last row of quantize.codebooks.{level}.weight is not zero; "
                "expected one padding row behind the codes"
            )
    return torch.stack([codebook[:-1] for codebook in tensors])


def _third(index: int, tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0].chunk(3)[index]


def _without_kernel(tensors: Sequence[Tensor]) -> Tensor:
    """A 1x1 convolution (D, C, 1, 1) as the matrix (D, C)."""
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
    behind = "SigLIP layers behind the features"
    return {
        r"quantize\.codebook_used": "code usage counts",
        r"quantize\.codebooks\.\d+\.(cluster_size_ema|embed_ema)": "learning state of the codebooks",
        r"scaling_layer\.(shift|scale)": "image scaling, done by the image processor",
        rf"{at}embeddings\.position_ids": "counting numbers",
        rf"{at}(post_layernorm|head)\..+": behind,
        rf"{at}encoder\.layers\.({'|'.join(map(str, later)) or 'none'})\..+": behind,
    }


@dataclass(frozen=True)
class ConvertedTokenizer:
    """A research tokenizer as configuration and weights of `EvoTokModel`, and what was left out, counted by reason."""

    config: EvoTokConfig
    state: dict[str, Tensor]
    bookkeeping: Counter[str]


def convert_tokenizer(weights: Mapping[str, Tensor], options: TokenizerOptions | None = None) -> ConvertedTokenizer:
    """Map the weights of a research tokenizer.

    Raises:
        UserError: keys that are missing, unknown or of another shape, an MLLM's file, or images scaled otherwise.
    """
    if looks_like_adapters(weights):
        raise UserError(
            "the file holds the depth transformer or a projector of the MLLM, not a tokenizer; "
            "`evotok-llava convert` takes it"
        )
    config, tower = infer_config(weights, options), _tower_prefix(weights)
    converted = convert_weights(
        weights, _tokenizer_sources(config, tower), _tokenizer_bookkeeping(weights, config, tower)
    )
    for name in ("scaling_layer.shift", "scaling_layer.scale"):
        if name in weights and not (weights[name] == 0.5).all():
            raise UserError(f"{name} is {weights[name].flatten().tolist()}, expected 0.5 everywhere: images in [-1, 1]")
    return ConvertedTokenizer(config, converted.state, converted.bookkeeping)


def convert_checkpoint(
    checkpoint: str | Path, output: str | Path, options: TokenizerOptions | None = None
) -> ConvertedTokenizer:
    """Write a research checkpoint as a folder that `EvoTokModel.from_pretrained` loads, with its image processor.

    Raises:
        UserError: a checkpoint that cannot be read or does not fit, or an output folder that is not empty.
    """
    check_new_folder(output)
    converted = convert_tokenizer(read_checkpoint(checkpoint), options)

    def write(folder: Path) -> None:
        with torch.device("meta"):  # the names alone: the weights are given
            model = EvoTokModel(converted.config)
        model.save_pretrained(folder, state_dict=dict(converted.state))  # it empties what it is given
        EvoTokImageProcessor(size=converted.config.image_size).save_pretrained(folder)

    write_whole_folder(output, write)
    return converted
