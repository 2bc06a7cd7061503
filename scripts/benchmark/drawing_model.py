"""Models with random weights for the benchmarks of drawing: the time does not depend on the values of weights."""

import argparse
from typing import Any

import torch
from transformers import BatchFeature

from evotok_plugin import EvoTokConfig
from llava_ext import EvoTokLlavaConfig, EvoTokLlavaForConditionalGeneration

PROMPT_TOKENS = 40
# Sizes of Qwen2.5; the vocabulary is small because drawing does not use it.
BACKBONES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    "small": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 8},
    "0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
    "1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
}
HEADS = {"paper": (2560, 6, 40), "tiny": (128, 2, 4)}


def make_model(
    options: argparse.Namespace,
    text_config: dict[str, Any] | None = None,
    preset: str = "paper",
    **tower_settings: Any,
) -> EvoTokLlavaForConditionalGeneration:
    """Create a model with random weights; the tokenizer's encoder, unused in drawing, has one layer.

    Args:
        options: with `backbone`, `head`, `dtype` and `device`.
        text_config: sizes of the language model instead of those of `backbone`.
        preset: of the tokenizer.
        tower_settings: fields of the tokenizer's configuration that differ from the preset.
    """
    tower = EvoTokConfig.preset(preset, encoder_num_layers=1, semantic_num_layers=1, **tower_settings)
    text = {"model_type": "qwen2", "vocab_size": 1000, "num_key_value_heads": 2, **BACKBONES[options.backbone]}
    text = text_config or text
    width, layers, heads = HEADS[options.head]
    config = EvoTokLlavaConfig(
        text_config=text,
        vision_config=tower,
        image_token_id=0,
        image_start_token_id=1,
        image_end_token_id=2,
        residual_token_offset=text["vocab_size"],
        head_hidden_size=width,
        head_num_layers=layers,
        head_num_heads=heads,
    )
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    model = EvoTokLlavaForConditionalGeneration(config)
    for part in (model.language_model, model.image_head, model.write_projector, model.lm_head):
        part.to(dtype)
    return model.to(options.device).eval()


class Prompts:
    """Replaces the processor: prompts of random tokens, all of the same length."""

    def drawing_prompts(self, prompts: list[str]) -> BatchFeature:
        rows = [
            torch.randint(3, 1000, (PROMPT_TOKENS,), generator=torch.Generator().manual_seed(len(p))) for p in prompts
        ]
        ids = torch.stack(rows)
        return BatchFeature({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
