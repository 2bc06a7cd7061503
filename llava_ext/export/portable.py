"""Export a model as a self-contained folder with a model card."""

from pathlib import Path

import torch
from torch import nn

from evotok_plugin.common.folders import write_whole_folder
from evotok_plugin.common.templates import open_template
from llava_ext.configuration_evotok_llava import EvoTokLlavaConfig
from llava_ext.export.remote_code import write_remote_code
from llava_ext.generation.options import DrawingOptions
from llava_ext.model_folder import load_model, save_model, tower_aside
from llava_ext.modeling_evotok_llava import EvoTokLlavaForConditionalGeneration
from llava_ext.serving.introduction import copy_introduction


def export_model(
    folder: str | Path,
    output: str | Path,
    dtype: torch.dtype | str = "auto",
    decoder_dtype: torch.dtype | str = "float32",
    remote_code: bool = False,
) -> None:
    """Write a self-contained model folder: weights, configuration, processor and a model card, which keeps the
    introduction for the demo page of the exported folder's card.

    Args:
        folder: a trained model, or a checkpoint of a run.
        dtype: of all weights except the tokenizer's; "auto" keeps the saved dtype.
        decoder_dtype: of the tokenizer's two decoders in the files; loading converts them to float32. The encoder and
            the codebooks, which determine the codes, are always written in float32.
        remote_code: add the code of model and processor, for `trust_remote_code=True` without this package.

    Raises:
        UserError: the folder is not a complete model, or the output exists or cannot be written.
    """
    model, processor = load_model(folder, dtype)
    if isinstance(decoder_dtype, str):
        decoder_dtype = getattr(torch, decoder_dtype)
    for decoder in (model.vision_tower.pixel_decoder, model.vision_tower.semantic_decoder):
        decoder.to(decoder_dtype)

    def write(out: Path) -> None:
        save_model(model, out, max_shard_size="5GB")
        processor.save_pretrained(out)
        if remote_code:
            write_remote_code(out)
        card = copy_introduction(folder, out) + _model_card(model, remote_code)
        (out / "README.md").write_text(card, encoding="utf-8")

    write_whole_folder(output, write)


def _model_card(model: EvoTokLlavaForConditionalGeneration, remote_code: bool) -> str:
    config, vision, text = model.config, model.config.vision_config, model.config.text_config
    drawing = DrawingOptions().for_model(model).settings()
    with tower_aside(model):  # its size and dtype are listed separately
        size, dtype = _millions(model), str(model.dtype).removeprefix("torch.")
    rows = {
        "text backbone": f"{text.model_type}, {text.num_hidden_layers} layers, {text.hidden_size} wide",
        "image tokenizer": f"{vision.image_size} x {vision.image_size} pixels, {vision.num_positions} positions, "
        f"{vision.num_quantizers} levels of {vision.codebook_size} codes",
        "image head": f"{_describe_head(config)}, {vision.pixel_depth} levels",
        "parameters": f"{size:.1f} M in {dtype}",
        "of the tokenizer": f"{_millions(model.vision_tower):.1f} M in float32",
        "draws with": ", ".join(f"{name} {value}" for name, value in drawing.items() if name != "negative_prompt"),
    }
    return open_template("llava_ext.export", "model_card.md.jinja").render(rows=rows, remote_code=remote_code)


def _millions(module: nn.Module) -> float:
    """The number of parameters in millions."""
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


def _describe_head(config: EvoTokLlavaConfig) -> str:
    if config.image_head == "flat":
        rows = "rows tied to the codebooks" if config.residual_embeddings == "tied" else "free rows"
        return f"flat: residual tokens are tokens of the LLM, {rows}"
    return f"depth transformer, {config.head_num_layers} layers, {config.head_hidden_size} wide"
