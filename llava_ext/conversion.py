"""Conversion of adapters of the research MLLM: `rqtransformer.bin` (depth transformer) and `mm_projector.bin`.

The research code trains two models, one for understanding and one for generation, and saves a projector of each; the
input width tells them apart. Classifiers of levels that are never drawn are left out. Our projectors also add position
embeddings, which research projectors do not have; they are set to zero.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from evotok_plugin import DepthTransformerConfig, DepthTransformerHead, EvoTokConfig
from evotok_plugin.common.folders import check_new_folder, write_whole_folder
from evotok_plugin.conversion.accounting import Shapes, Source, conventional_heads, convert_weights, rename
from evotok_plugin.conversion.research_file import looks_like_adapters, read_checkpoint
from evotok_plugin.errors import UserError
from evotok_plugin.model_folder import model_type_of, open_config
from llava_ext.assembly import assemble
from llava_ext.backbone import open_backbone_config
from llava_ext.configuration_evotok_llava import EvoTokLlavaConfig
from llava_ext.conversion_options import HeadOptions
from llava_ext.projector import Projector

_HEAD_RENAMES = (
    (r"^from_hidden\.", "in_mlp_2."),
    (r"^from_latent\.", "in_mlp_1."),
    (r"^level_embedding$", "pos_emb_d"),
    (r"^blocks\.", "head_transformer.blocks."),
    (r"\.norm_([12])\.", r".ln\1."),
    (r"\.proj\.", ".attn.proj."),
)
_PROJECTOR_RENAMES = ((r"^linear_1\.", "0."), (r"^linear_2\.", "2."))


@dataclass(frozen=True)
class ConvertedHead:
    """Sizes and weights for `DepthTransformerHead`, and the number of research keys left out for each reason."""

    sizes: DepthTransformerConfig
    state: dict[str, Tensor]
    bookkeeping: Counter[str]


@dataclass(frozen=True)
class ConvertedProjector:
    """Weights for `Projector` without its position embedding, which the research code does not have."""

    in_features: int
    out_features: int
    state: dict[str, Tensor]


def _prefix(weights: Mapping[str, Tensor], mark: str) -> str | None:
    """The part before `mark` of the first name that ends with it; None if no name does."""
    return next((name.removesuffix(mark) for name in weights if name.endswith(mark)), None)


def is_depth_transformer(weights: Mapping[str, Tensor]) -> bool:
    """Whether the weights belong to a depth transformer, complete or not."""
    return any("rqtransformer." in name or name.endswith("pos_emb_d") for name in weights)


def convert_depth_transformer(weights: Mapping[str, Tensor], num_heads: int | None = None) -> ConvertedHead:
    """Map the weights of a `rqtransformer.bin`.

    Args:
        num_heads: number of attention heads, which cannot be inferred from shapes; by default of 64 dimensions each.

    Raises:
        UserError: keys that are missing, unknown or of another shape.
    """
    prefix = _prefix(weights, "pos_emb_d")
    if prefix is None:
        raise UserError("1 missing: pos_emb_d, which gives the number of levels of the depth transformer")
    shapes = Shapes(weights)
    first_classifier = f"{prefix}classifiers.0.1.weight"
    shapes.require([f"{prefix}in_mlp_1.weight", f"{prefix}in_mlp_2.weight", first_classifier])
    hidden_size, llm_hidden_size = shapes.of(f"{prefix}in_mlp_2.weight", 2)
    num_levels = shapes.of(f"{prefix}pos_emb_d", 3)[1]
    sizes = DepthTransformerConfig(
        llm_hidden_size=llm_hidden_size,
        codebook_dim=shapes.of(f"{prefix}in_mlp_1.weight", 2)[1],
        codebook_size=shapes.of(first_classifier, 2)[0],
        num_levels=num_levels,
        hidden_size=hidden_size,
        num_layers=shapes.count(f"{prefix}head_transformer.blocks."),
        num_heads=num_heads or conventional_heads(hidden_size, "--head_num_heads"),
    )
    with torch.device("meta"):
        ours = DepthTransformerHead(sizes).state_dict()
    sources = {name: _head_source(name, tuple(tensor.shape), prefix) for name, tensor in ours.items()}
    unused = "|".join(map(str, range(num_levels, shapes.count(f"{prefix}classifiers.")))) or "none"
    bookkeeping = {rf"{re.escape(prefix)}classifiers\.({unused})\..+": "classifiers of levels never drawn"}
    converted = convert_weights(weights, sources, bookkeeping)
    return ConvertedHead(sizes, converted.state, converted.bookkeeping)


def _head_source(name: str, shape: tuple[int, ...], prefix: str) -> Source:
    theirs = prefix + rename(name, _HEAD_RENAMES)
    if name == "level_embedding":
        return Source((theirs,), (1, *shape), lambda tensors: tensors[0][0])
    if ".qkv." in name:
        parts = tuple(theirs.replace(".qkv.", f".attn.{part}.") for part in ("query", "key", "value"))
        return Source(parts, (shape[0] // 3, *shape[1:]), lambda tensors: torch.cat(list(tensors)))
    return Source((theirs,), shape)


def convert_projector(weights: Mapping[str, Tensor]) -> ConvertedProjector:
    """Map the weights of a `mm_projector.bin`: two linear layers with a GELU between them.

    Raises:
        UserError: keys that are missing, unknown or of another shape.
    """
    prefix = _prefix(weights, "mm_projector.0.weight")
    if prefix is None:
        raise UserError("1 missing: model.mm_projector.0.weight")
    prefix += "mm_projector."
    out_features, in_features = Shapes(weights).of(f"{prefix}0.weight", 2)
    with torch.device("meta"):
        ours = Projector(in_features, out_features, num_positions=1).state_dict()
    del ours["position_embedding"]
    sources = {
        name: Source((prefix + rename(name, _PROJECTOR_RENAMES),), tuple(tensor.shape)) for name, tensor in ours.items()
    }
    return ConvertedProjector(in_features, out_features, convert_weights(weights, sources, {}).state)


# A complete model --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ConvertedModel:
    """Report of a conversion.

    Attributes:
        parts: for every converted part the file that it comes from.
        random: parts without a file, which are initialized at random.
        bookkeeping: number of research keys left out for each reason.
    """

    parts: dict[str, Path]
    random: list[str]
    bookkeeping: Counter[str]


def convert_adapters(
    files: Sequence[str | Path],
    language_model: str | Path,
    vision_tower: str | Path,
    output: str | Path,
    options: HeadOptions | None = None,
    dtype: torch.dtype = torch.float32,
) -> ConvertedModel:
    """Assemble a model from a causal LM, a converted tokenizer and research adapters, and save it.

    Args:
        files: `rqtransformer.bin` and up to two `mm_projector.bin`, in any order.
        output: new folder, for `EvoTokLlavaForConditionalGeneration.from_pretrained`.

    Raises:
        UserError: a file cannot be read or does not fit, two files are given for one part, or the output is not empty.
    """
    check_new_folder(output)
    if model_type_of(vision_tower) != EvoTokConfig.model_type:
        raise UserError(f"{str(vision_tower)!r} is not an EvoTok tokenizer; create one with `evotok convert`")
    tokenizer = open_config(EvoTokConfig, vision_tower)
    tokenizer.require_semantics(repr(str(vision_tower)))
    width = open_backbone_config(language_model).get_text_config().hidden_size
    options = options or HeadOptions()
    parts: dict[str, Path] = {}
    states: dict[str, dict[str, Tensor]] = {}
    bookkeeping: Counter[str] = Counter()
    for file in map(Path, files):
        weights = read_checkpoint(file)
        try:
            if not looks_like_adapters(weights):
                raise UserError(
                    "expected the weights of a depth transformer (rqtransformer.bin) or a projector "
                    "(mm_projector.bin); convert a tokenizer with `evotok convert`"
                )
            if is_depth_transformer(weights):
                part, head = "image_head", convert_depth_transformer(weights, options.head_num_heads)
                _check_head(head.sizes, options, tokenizer, width)
                state, options = head.state, _resolved(head.sizes)
                bookkeeping += head.bookkeeping
            else:
                projector = convert_projector(weights)
                part, state = _projector_part(projector, tokenizer, width), projector.state
        except UserError as error:
            raise UserError(f"{str(file)!r}: {error}") from error
        if part in parts:
            raise UserError(f"{str(parts[part])!r} and {str(file)!r} are both the {part}; give only one of them")
        parts[part], states[part] = file, state
    default = EvoTokLlavaConfig
    model, processor = assemble(
        language_model,
        vision_tower,
        options.head_hidden_size or default.head_hidden_size,
        options.head_num_layers or default.head_num_layers,
        options.head_num_heads or default.head_num_heads,
        dtype=dtype,
    )
    for part, state in states.items():
        module = getattr(model, part)
        if isinstance(module, Projector):
            state = state | {"position_embedding": torch.zeros_like(module.position_embedding)}
        module.load_state_dict(state, strict=True)

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)

    write_whole_folder(output, write)
    missing = [part for part in ("read_projector", "write_projector", "image_head") if part not in parts]
    return ConvertedModel(parts, missing, bookkeeping)


def _check_head(sizes: DepthTransformerConfig, options: HeadOptions, tokenizer: EvoTokConfig, width: int) -> None:
    wanted = {
        "llm_hidden_size": (sizes.llm_hidden_size, width, "the language model's width"),
        "codebook_dim": (sizes.codebook_dim, tokenizer.codebook_dim, "the tokenizer's codebook_dim"),
        "codebook_size": (sizes.codebook_size, tokenizer.codebook_size, "the tokenizer's codebook_size"),
        "num_levels": (sizes.num_levels, tokenizer.pixel_depth, "the tokenizer's pixel_depth"),
        "hidden_size": (sizes.hidden_size, options.head_hidden_size, "--head_hidden_size"),
        "num_layers": (sizes.num_layers, options.head_num_layers, "--head_num_layers"),
    }
    for name, (found, expected, source) in wanted.items():
        if expected is not None and found != expected:
            raise UserError(f"the depth transformer's {name} is {found}, but {source} is {expected}")


def _resolved(sizes: DepthTransformerConfig) -> HeadOptions:
    return HeadOptions(
        head_hidden_size=sizes.hidden_size, head_num_layers=sizes.num_layers, head_num_heads=sizes.num_heads
    )


def _projector_part(projector: ConvertedProjector, tokenizer: EvoTokConfig, width: int) -> str:
    """Return the part that the projector belongs to: features are read, latents are written."""
    if projector.out_features != width:
        raise UserError(
            f"the projector's output is {projector.out_features} wide, but the language model is {width} wide"
        )
    found = {"read_projector": tokenizer.semantic_dim, "write_projector": tokenizer.codebook_dim}
    parts = [part for part, in_features in found.items() if in_features == projector.in_features]
    if len(parts) != 1:
        raise UserError(
            f"the projector's input is {projector.in_features} wide, expected either {tokenizer.semantic_dim} "
            f"(semantic features to read) or {tokenizer.codebook_dim} (latents to write), which must differ"
        )
    return parts[0]
