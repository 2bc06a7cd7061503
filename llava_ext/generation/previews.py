"""Previews of images that are still being drawn."""

import torch
from PIL.Image import Image
from torch import Tensor

from evotok_plugin import EvoTokModel
from llava_ext.processing_evotok_llava import EvoTokLlavaProcessor

_GRAY = 0.0  # of pixels in [-1, 1]


@torch.no_grad()
def preview(tokenizer: EvoTokModel, processor: EvoTokLlavaProcessor, codes: Tensor) -> list[Image]:
    """Decode the first positions of images, codes (R, p, l), to R images; positions that are missing are gray.

    Positions are in row-major order. The decoder reads the last drawn position in place of the missing ones.
    """
    vision = tokenizer.config
    drawn, missing = codes.shape[1], vision.num_positions - codes.shape[1]
    filled = torch.cat([codes, codes[:, -1:].expand(-1, missing, -1)], dim=1)
    pixels = tokenizer.decode_pixels(filled)
    known = torch.arange(vision.num_positions, device=codes.device) < drawn
    side, patch = vision.image_size // vision.patch_size, vision.patch_size
    known = known.view(side, side).repeat_interleave(patch, 0).repeat_interleave(patch, 1)
    return processor.image_processor.to_pil(pixels.masked_fill(~known, _GRAY))
