"""Model folders: assemble one from a text backbone and a tokenizer, open one, say what is wrong with one."""

import json
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from evotok_plugin import EvoTokImageProcessor, EvoTokModel
from llava_ext.configuration_evotok_llava import EvoTokLlavaConfig
from llava_ext.modeling_evotok_llava import EvoTokLlavaForConditionalGeneration
from llava_ext.processing_evotok_llava import IMAGE_TOKENS, EvoTokLlavaProcessor

DEFAULT_MODELS = ("outputs/finetune", "outputs/quickstart/finetune")


def model_type_of(folder: str | Path) -> str:
    """The `model_type` of a model folder.

    Raises:
        ValueError: no such folder, or no model in it.
    """
    config = Path(folder) / "config.json"
    if not Path(folder).is_dir():
        raise ValueError(f"model folder {str(folder)!r} does not exist")
    if not config.is_file():
        raise ValueError(f"{str(folder)!r} is no model folder: it holds no config.json")
    try:
        return json.loads(config.read_text()).get("model_type", "")
    except json.JSONDecodeError as error:
        raise ValueError(f"{config} is not valid JSON: {error}") from error


def load_model(
    folder: str | Path, dtype: torch.dtype = torch.float32, attn_implementation: str = "sdpa"
) -> tuple[EvoTokLlavaForConditionalGeneration, EvoTokLlavaProcessor]:
    """Open a saved EvoTok-LLaVA folder; every weight must be there and fit.

    Raises:
        ValueError: not such a folder, or weights that are missing, left over or of another shape.
    """
    kind = model_type_of(folder)
    if kind != EvoTokLlavaConfig.model_type:
        raise ValueError(
            f"{str(folder)!r} holds a {kind or 'nameless'} model, expected {EvoTokLlavaConfig.model_type}; "
            "give the output folder of scripts/pretrain.sh or scripts/finetune.sh"
        )
    try:
        model, report = EvoTokLlavaForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, attn_implementation=attn_implementation, output_loading_info=True
        )
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{str(folder)!r} cannot be loaded: {error}") from error
    problems = {
        what: sorted(map(str, report[what])) for what in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if report.get(what)
    }  # fmt: skip
    if problems:
        shown = "; ".join(f"{what}: {', '.join(keys[:5])}" for what, keys in problems.items())
        raise ValueError(f"{str(folder)!r} is not a whole checkpoint of this model: {shown}")
    return model, EvoTokLlavaProcessor.from_pretrained(folder)


def default_model_folder() -> Path:
    """Where the newest trained model of this working folder lies.

    Raises:
        ValueError: there is none.
    """
    found = [Path(folder) for folder in DEFAULT_MODELS if (Path(folder) / "config.json").is_file()]
    if not found:
        raise ValueError(
            f"no trained model in {' or '.join(DEFAULT_MODELS)}; run `bash scripts/quickstart.sh`, "
            "or name one with --model"
        )
    return max(found, key=lambda folder: (folder / "config.json").stat().st_mtime)


def assemble(
    language_model: str | Path,
    vision_tower: str | Path,
    head_hidden_size: int,
    head_num_layers: int,
    head_num_heads: int,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "sdpa",
) -> tuple[EvoTokLlavaForConditionalGeneration, EvoTokLlavaProcessor]:
    """A new model from a causal LM folder and an EvoTok folder; projectors and image head start at random.

    Raises:
        ValueError: a folder that does not hold what is needed.
    """
    if model_type_of(vision_tower) != "evotok":
        raise ValueError(f"{str(vision_tower)!r} is no EvoTok tokenizer (model_type {model_type_of(vision_tower)!r})")
    try:
        backbone = AutoModelForCausalLM.from_pretrained(
            language_model, dtype=dtype, attn_implementation=attn_implementation
        )
        tokenizer = AutoTokenizer.from_pretrained(language_model)
    except (OSError, ValueError) as error:
        raise ValueError(f"text model {str(language_model)!r} cannot be loaded: {error}") from error
    tower = EvoTokModel.from_pretrained(vision_tower, dtype=torch.float32)  # what chooses codes is fp32
    images = EvoTokImageProcessor.from_pretrained(vision_tower)
    processor = EvoTokLlavaProcessor.from_parts(images, tokenizer, tower.config, backbone.config.vocab_size)
    if len(tokenizer) > backbone.config.vocab_size:
        backbone.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    _start_from_mean(backbone, tokenizer.convert_tokens_to_ids(list(IMAGE_TOKENS)))
    backbone.config._name_or_path = tower.config._name_or_path = ""  # a checkpoint names no folder of this machine
    config = EvoTokLlavaConfig(
        text_config=backbone.config.to_dict(),
        vision_config=tower.config.to_dict(),
        image_token_id=processor.image_token_id,
        image_start_token_id=processor.image_start_id,
        image_end_token_id=processor.image_end_id,
        residual_token_offset=processor.residual_token_offset,
        head_hidden_size=head_hidden_size,
        head_num_layers=head_num_layers,
        head_num_heads=head_num_heads,
        initializer_range=backbone.config.initializer_range,
    )
    # A skeleton without memory receives the loaded parts; only what is new is then filled with random numbers.
    with torch.device("meta"):
        model = EvoTokLlavaForConditionalGeneration(config)
    model.vision_tower = tower.requires_grad_(False)
    model.language_model = backbone.get_decoder()
    model.lm_head = backbone.get_output_embeddings()
    model.config.text_config = model.language_model.config
    for part in (model.read_projector, model.write_projector, model.image_head):
        part.to_empty(device=tower.device)
        part.to(dtype)
        part.apply(model._init_weights)
    _start_on_the_scale_of_text(model)
    model.generation_config = backbone.generation_config
    if model.generation_config.eos_token_id is None:
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        )
    return model, processor


@torch.no_grad()
def _start_from_mean(backbone: nn.Module, ids: list[int]) -> None:
    """Give the new tokens' embedding and output rows the mean of all other rows."""
    for layer in (backbone.get_input_embeddings(), backbone.get_output_embeddings()):
        others = torch.ones(layer.weight.shape[0], dtype=torch.bool)
        others[ids] = False
        layer.weight[ids] = layer.weight[others].mean(dim=0)


@torch.no_grad()
def _start_on_the_scale_of_text(model: EvoTokLlavaForConditionalGeneration) -> None:
    """Scale both projectors so that image features of random codes are as large as token embeddings.

    A tower's features may be tens of times larger; they would drown the embedding of the place in the image.
    """
    vision, tower = model.config.vision_config, model.vision_tower
    shape = (max(2, 256 // vision.num_positions), vision.num_positions, vision.num_quantizers)
    codes = torch.randint(vision.codebook_size, shape, generator=torch.Generator().manual_seed(0)).to(tower.device)
    size = model.get_input_embeddings().weight.float().square().mean().sqrt()
    latents = tower.codes_to_latents(codes[..., : vision.pixel_depth])
    for projector, features in (
        (model.read_projector, tower.decode_semantics(codes)),
        (model.write_projector, latents),
    ):
        projected = projector.project(features.to(projector.linear_1.weight.dtype)).float()
        projector.linear_2.weight.mul_(size / projected.square().mean().sqrt())
