"""Assemble a model from a text backbone and an image tokenizer: new parts, new tokens, initial values."""

from pathlib import Path

import torch
from torch import Tensor, nn

from evotok_plugin import EvoTokConfig
from evotok_plugin.errors import UserError
from evotok_plugin.model_folder import model_type_of
from evotok_plugin.tokenizer_folder import load_tokenizer, open_image_processor
from llava_ext.backbone import open_backbone, open_backbone_config
from llava_ext.configuration_evotok_llava import EvoTokLlavaConfig
from llava_ext.flat_head import FlatHead, initialize_rows
from llava_ext.generation.options import store_settings
from llava_ext.modeling_evotok_llava import EvoTokLlavaForConditionalGeneration
from llava_ext.new_tokens import initialize_new_rows
from llava_ext.processing_evotok_llava import IMAGE_TOKENS, EvoTokLlavaProcessor

NEW_PARTS = ("read_projector", "write_projector", "image_head")  # a flat model has no write_projector


def assemble(
    language_model: str | Path,
    vision_tower: str | Path,
    head_hidden_size: int,
    head_num_layers: int,
    head_num_heads: int,
    dtype: torch.dtype | str = torch.float32,
    attn_implementation: str = "sdpa",
    quantization_config: object | None = None,
    image_head: str = "depth",
    residual_embeddings: str = "tied",
) -> tuple[EvoTokLlavaForConditionalGeneration, EvoTokLlavaProcessor]:
    """Create a model from a causal LM folder and an EvoTok folder, with random projectors and a random image head.

    New image tokens are initialized near the mean of all other tokens (`new_tokens`). Residual tokens have no rows in
    the backbone's embedding and output layers: the image head has them.

    Args:
        language_model: folder or hub id of a causal LM, or a GGUF file (`open_backbone`).
        vision_tower: folder of an EvoTok tokenizer with a trained semantic decoder.
        head_hidden_size, head_num_layers, head_num_heads: size of the depth transformer.
        dtype: of the backbone and the new parts; the tokenizer is always float32.
        attn_implementation: "sdpa" becomes "eager" for a backbone without SDPA.
        quantization_config: a quantization config of transformers, to quantize the backbone while it loads.
        image_head: "depth" or "flat".
        residual_embeddings: with the flat head, "tied" to the codebooks or "free".

    Raises:
        UserError: a folder does not hold a complete model of the expected kind.
    """
    if model_type_of(vision_tower) != EvoTokConfig.model_type:
        raise UserError(
            f"{str(vision_tower)!r} is not an EvoTok tokenizer (model_type {model_type_of(vision_tower)!r})"
        )
    open_backbone_config(language_model)  # a wrong path is reported before anything is loaded
    tower = load_tokenizer(vision_tower, dtype=torch.float32)  # rounded codebooks would choose other codes
    tower.config.require_semantics(repr(str(vision_tower)))
    images = open_image_processor(vision_tower)
    opened = open_backbone(language_model, dtype, attn_implementation, quantization_config)
    backbone, tokenizer = opened.model, opened.tokenizer
    processor = EvoTokLlavaProcessor.from_parts(images, tokenizer, tower.config, backbone.config.vocab_size, image_head)
    new = {*tokenizer.convert_tokens_to_ids(list(IMAGE_TOKENS)), *range(backbone.config.vocab_size, len(tokenizer))}
    if len(tokenizer) > backbone.config.vocab_size:
        backbone.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    layers = (backbone.get_input_embeddings(), backbone.get_output_embeddings())
    for table in {_table(layer) for layer in layers}:  # one table where embeddings are tied
        initialize_new_rows(table, sorted(new))
    backbone.config.use_cache = True
    backbone.config._name_or_path = tower.config._name_or_path = ""  # no paths of this machine
    config = EvoTokLlavaConfig(
        text_config=backbone.config.to_dict(),
        vision_config=tower.config.to_dict(),
        image_token_id=processor.image_token_id,
        image_start_token_id=processor.image_start_id,
        image_end_token_id=processor.image_end_id,
        residual_token_offset=processor.residual_token_offset,
        image_head=image_head,
        residual_embeddings=residual_embeddings,
        head_hidden_size=head_hidden_size,
        head_num_layers=head_num_layers,
        head_num_heads=head_num_heads,
        initializer_range=backbone.config.initializer_range,
    )
    # The loaded parts go into a model on the meta device; only the new parts are then initialized.
    with torch.device("meta"):
        model = EvoTokLlavaForConditionalGeneration(config)
    tower.quantizer.fix()
    model.vision_tower = tower.requires_grad_(False)
    model.language_model = backbone.get_decoder()
    model.lm_head = backbone.get_output_embeddings()
    model.config.text_config = model.language_model.config
    for part in (getattr(model, name) for name in NEW_PARTS if hasattr(model, name)):
        part.to_empty(device=tower.device)
        part.to(backbone.dtype)
        part.apply(model._init_weights)
    _match_scale_of_text(model)
    model.generation_config = backbone.generation_config
    if model.generation_config._from_model_config:  # `use_cache` may be a leftover of training
        model.generation_config.use_cache = True
    store_settings(model.generation_config)
    if model.generation_config.eos_token_id is None:
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        )
    return model, processor


@torch.no_grad()
def _match_scale_of_text(model: EvoTokLlavaForConditionalGeneration) -> None:
    """Scale the projectors so that images of random codes match the root mean square of token embeddings, and the
    output rows of a flat head so that they match those of text.

    The tokenizer's features can be tens of times larger and would drown out the position embedding.
    """
    vision, tower = model.config.vision_config, model.vision_tower
    shape = (max(2, 256 // vision.num_positions), vision.num_positions, vision.num_quantizers)
    codes = torch.randint(vision.codebook_size, shape, generator=torch.Generator().manual_seed(0)).to(tower.device)
    layers = (model.get_input_embeddings(), model.lm_head)
    # Tensors: a division by a tensor rounds differently if the dividend is a Python number.
    size, of_output = (_root_mean_square(_table(layer)) for layer in layers)
    inputs = [(model.read_projector, tower.decode_semantics(codes))]
    if isinstance(model.image_head, FlatHead):
        initialize_rows(model.image_head, tower.quantizer.codebooks, size, of_output)
    else:
        inputs.append((model.write_projector, tower.codes_to_latents(codes[..., : vision.pixel_depth])))
    for projector, features in inputs:
        output = projector.project(features.to(projector.linear_1.weight.dtype))
        projector.linear_2.weight.mul_(size / _root_mean_square(output))


def _table(layer: nn.Module) -> Tensor:
    """The rows of an embedding or output layer."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def _root_mean_square(values: Tensor) -> Tensor:
    return values.float().square().mean().sqrt()
