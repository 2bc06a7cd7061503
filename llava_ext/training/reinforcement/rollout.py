"""Drawings of the model during training, decided by seeds that a resumed run computes again.

R rows, N positions, L levels.
"""

import hashlib
from collections.abc import Sequence

import torch
from PIL.Image import Image
from torch import Tensor

from llava_ext.generation.options import DrawingOptions
from llava_ext.modeling_evotok_llava import EvoTokLlavaForConditionalGeneration
from llava_ext.new_tokens import show_rows_in_table
from llava_ext.processing_evotok_llava import EvoTokLlavaProcessor


def drawing_seed(seed: int, step: int, place: int, prompt: str, index: int) -> int:
    """The seed of drawing `index` of the prompt at a place of a step; independent of all others, 63 bits."""
    digest = hashlib.sha256(f"{seed} {step} {place} {index} {prompt}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@torch.no_grad()
def draw(
    model: EvoTokLlavaForConditionalGeneration,
    processor: EvoTokLlavaProcessor,
    prompts: Sequence[str],
    seeds: Sequence[int],
    options: DrawingOptions,
    batch_size: int,
) -> Tensor:
    """Draw an image per prompt, `batch_size` at once: codes (R, N, L).

    Dropout is switched off: the model is left in evaluation mode.
    """
    model.eval()
    show_rows_in_table(model)
    vision, parts = model.config.vision_config, list[Tensor]()
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        *_, codes = model.draw_codes(prompts[part], processor, seeds[part], options)
        parts.append(codes)
    if not parts:
        return torch.empty(0, vision.num_positions, vision.pixel_depth, dtype=torch.long, device=model.device)
    return torch.cat(parts)


@torch.no_grad()
def to_images(
    model: EvoTokLlavaForConditionalGeneration, processor: EvoTokLlavaProcessor, codes: Tensor, batch_size: int
) -> list[Image]:
    """Decode codes (R, N, L) to R images."""
    return [
        image
        for part in codes.split(batch_size)
        for image in processor.image_processor.to_pil(model.vision_tower.decode_pixels(part))
    ]
