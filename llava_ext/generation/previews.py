"""Images that are not finished."""

import torch
from PIL.Image import Image
from torch import Tensor

_GREY = 0.0  # of pixels in [-1, 1]


@torch.no_grad()
def preview(tokenizer, processor, codes: Tensor) -> list[Image]:
    """What an image's first positions show, codes (R, p, l): R images, grey where nothing is drawn yet.

    Positions stand row by row; for the decoder the last one goes on over those that are missing.
    """
    vision = tokenizer.config
    drawn, missing = codes.shape[1], vision.num_positions - codes.shape[1]
    filled = torch.cat([codes, codes[:, -1:].expand(-1, missing, -1)], dim=1)
    pixels = tokenizer.decode_pixels(filled)
    known = torch.arange(vision.num_positions, device=codes.device) < drawn
    side, patch = vision.image_size // vision.patch_size, vision.patch_size
    known = known.view(side, side).repeat_interleave(patch, 0).repeat_interleave(patch, 1)
    return processor.image_processor.to_pil(pixels.masked_fill(~known, _GREY))
