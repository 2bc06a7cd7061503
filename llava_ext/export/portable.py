"""Export a model with its card into a folder that needs nothing else."""

from pathlib import Path

import torch

from evotok_plugin.common.folders import write_whole_folder
from llava_ext.configuration_evotok_llava import EvoTokLlavaConfig
from llava_ext.generation.options import DrawingOptions
from llava_ext.model_folder import load_model, save_model
from llava_ext.modeling_evotok_llava import EvoTokLlavaForConditionalGeneration


def export_model(
    folder: str | Path,
    output: str | Path,
    dtype: torch.dtype | str = "auto",
    decoder_dtype: torch.dtype | str = "float32",
) -> None:
    """Write a model folder that needs nothing else: weights, configuration, processor, how to load it.

    Args:
        folder: a trained model, or a checkpoint of a run.
        dtype: of all weights but the tokenizer's; "auto" leaves it.
        decoder_dtype: in which the tokenizer's two decoders are written; they are float32 again once loaded. What
            chooses codes is always written in float32.

    Raises:
        UserError: the folder is no whole model, or the output is there already or cannot be written.
    """
    model, processor = load_model(folder, dtype)
    if isinstance(decoder_dtype, str):
        decoder_dtype = getattr(torch, decoder_dtype)
    for decoder in (model.vision_tower.pixel_decoder, model.vision_tower.semantic_decoder):
        decoder.to(decoder_dtype)

    def write(out: Path) -> None:
        save_model(model, out, max_shard_size="5GB")
        processor.save_pretrained(out)
        (out / "README.md").write_text(_model_card(model))

    write_whole_folder(output, write)


def _model_card(model: EvoTokLlavaForConditionalGeneration) -> str:
    config, vision, text = model.config, model.config.vision_config, model.config.text_config
    drawing = DrawingOptions().for_model(model).settings()
    size, tower = (sum(p.numel() for p in part.parameters()) / 1e6 for part in (model, model.vision_tower))
    rows = {
        "text backbone": f"{text.model_type}, {text.num_hidden_layers} layers, {text.hidden_size} wide",
        "image tokenizer": f"{vision.image_size} x {vision.image_size} pixels, {vision.num_positions} positions, "
        f"{vision.num_quantizers} levels of {vision.codebook_size} codes",
        "image head": f"{_head_in_words(config)}, {vision.pixel_depth} levels",
        "parameters": f"{size:.1f} M in {str(model.dtype).removeprefix('torch.')}",
        "of the tokenizer": f"{tower:.1f} M in float32",
        "draws with": ", ".join(f"{name} {value}" for name, value in drawing.items() if name != "negative_prompt"),
    }
    return _MODEL_CARD.replace("ROWS", "\n".join(f"| {name} | {value} |" for name, value in rows.items()))


def _head_in_words(config: EvoTokLlavaConfig) -> str:
    if config.image_head == "flat":
        how = "rows tied to the codebooks" if config.residual_embeddings == "tied" else "rows of their own"
        return f"flat: residual tokens are tokens of the LLM, {how}"
    return f"depth transformer, {config.head_num_layers} layers, {config.head_hidden_size} wide"


_MODEL_CARD = """# EvoTok-LLaVA

One model that answers questions about images and draws images.

| part | |
|---|---|
ROWS

It needs the package `evotok` (`import llava_ext`). In this folder:

```python
from llava_ext import EvoTokLlavaForConditionalGeneration, EvoTokLlavaProcessor

model = EvoTokLlavaForConditionalGeneration.from_pretrained(".").eval()
processor = EvoTokLlavaProcessor.from_pretrained(".")
image = model.generate_images("a photo of a red circle", processor=processor, seed=0)[0]
image.save("drawn.png")

inputs = processor("<image>\\nWhat is it?", images=[image])
ids = model.generate(**inputs, max_new_tokens=32)
print(processor.decode(ids[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

```bash
evotok-llava draw "a photo of a red circle" --model . -o drawn/
evotok-llava chat "What is it?" --image drawn.png --model .
```
"""
