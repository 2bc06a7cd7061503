"""Pictures to `pixel_values` and back: the only place that knows about resizing, cropping and scaling."""

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import TensorType


class EvoTokImageProcessor(BaseImageProcessor):
    """PIL images, arrays or tensors to `pixel_values` (B, 3, size, size) in [-1, 1].

    The shorter side is resized to `size` (bicubic), then the centre is cropped.
    """

    model_input_names = ["pixel_values"]

    def __init__(self, size: int = 256, **kwargs) -> None:
        super().__init__(**kwargs)
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"size must be a positive number of pixels, got {size!r}")
        self.size = size

    def __call__(self, images, return_tensors: str | TensorType | None = "pt", **kwargs) -> BatchFeature:
        return self.preprocess(images, return_tensors=return_tensors, **kwargs)

    def preprocess(self, images, return_tensors: str | TensorType | None = "pt", **kwargs) -> BatchFeature:
        """Prepare one image or a list of them.

        Raises:
            ValueError: something that is no image, or an image of no pixels.
        """
        several = images if isinstance(images, (list, tuple)) else [images]
        if not len(several):
            raise ValueError("expected at least one image, got none")
        pixels = torch.stack([self._prepare(image) for image in several])
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)

    def _prepare(self, image) -> Tensor:
        picture = self.crop(as_picture(image))
        values = torch.from_numpy(np.array(picture, dtype=np.float32))
        return values.permute(2, 0, 1) / 127.5 - 1.0

    def crop(self, picture: Image.Image) -> Image.Image:
        """Resize the shorter side to `size` and crop the centre."""
        if picture.size == (self.size, self.size):
            return picture
        return ImageOps.fit(picture, (self.size, self.size), Image.Resampling.BICUBIC)

    @staticmethod
    def to_pil(pixels: Tensor) -> list[Image.Image]:
        """Pixels (B, 3, H, W) in [-1, 1] (clamped) to PIL images."""
        values = ((pixels.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return [Image.fromarray(image) for image in values.permute(0, 2, 3, 1).cpu().numpy()]


def as_picture(image) -> Image.Image:
    """Whatever holds an image to an RGB PIL image: PIL, (H, W, 3) array in 0..255, (3, H, W) tensor in 0..1.

    Raises:
        ValueError: anything else.
    """
    if isinstance(image, Image.Image):
        try:
            picture = image.convert("RGB")
        except OSError as error:
            raise ValueError(f"the image cannot be decoded: {error}") from error
    elif isinstance(image, Tensor) and image.ndim == 3 and image.shape[0] == 3:
        values = (image.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
        picture = Image.fromarray(values.permute(1, 2, 0).numpy())
    elif isinstance(image, np.ndarray) and image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8:
        picture = Image.fromarray(image)
    else:
        shape = f" of shape {tuple(image.shape)} and type {image.dtype}" if hasattr(image, "shape") else ""
        raise ValueError(
            "expected a PIL image, a uint8 array (H, W, 3) or a tensor (3, H, W) in 0..1, "
            f"got {type(image).__name__}{shape}"
        )
    if not min(picture.size):
        raise ValueError(f"the image has no pixels: {picture.size}")
    return picture
