"""Images to pixel values for code bases with LLaVA's interface; independent of transformers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from evotok_plugin.data.images import as_picture
from evotok_plugin.errors import UserError
from evotok_plugin.image_preparation import check_pixel_range, crop_square, flat_images, picture_values


class PixelValues(dict[str, Any]):
    """The result of an image processor: `pixel_values` as an item and as an attribute."""

    @property
    def pixel_values(self) -> Any:
        """Tensor or array (B, 3, size, size), or a list of tensors (3, size, size)."""
        return self["pixel_values"]


class TowerImageProcessor:
    """The pixels of `EvoTokImageProcessor`, with the attributes and calls that LLaVA uses.

    Args:
        size: pixels per side.
        pixel_range: values of a black and of a white pixel.
    """

    def __init__(self, size: int, pixel_range: Sequence[float] = (-1.0, 1.0)) -> None:
        check_pixel_range(pixel_range)
        black, white = pixel_range
        self.size, self.crop_size = {"shortest_edge": size}, {"height": size, "width": size}
        self.image_mean, self.image_std = [black / (black - white)] * 3, [1 / (white - black)] * 3

    def preprocess(self, images: Any, return_tensors: "str | None" = "pt", **kwargs: Any) -> PixelValues:
        """Prepare one image, nested lists of images, or the frames of a video as one array (F, H, W, 3).

        Args:
            return_tensors: "pt" or "np"; with None, `pixel_values` is a list of tensors.

        Raises:
            UserError: an input that is not an image, no image at all, or an argument that is not supported.
        """
        if return_tensors not in ("pt", "np", None):
            kwargs["return_tensors"] = return_tensors
        if kwargs:
            given = ", ".join(f"{key}={value!r}" for key, value in kwargs.items())
            raise UserError(f"the image processor of EvoTok's tower does not support {given}; leave it out")
        pixels = [self._pixel_values(image) for image in flat_images(images)]
        if not pixels:
            raise UserError("expected at least one image, got none")
        if return_tensors is None:
            return PixelValues(pixel_values=pixels)
        batch = torch.stack(pixels)
        return PixelValues(pixel_values=batch if return_tensors == "pt" else batch.numpy())

    __call__ = preprocess

    def _pixel_values(self, image: Any) -> Tensor:
        signed = picture_values(crop_square(as_picture(image), self.size["shortest_edge"]))
        if self.image_std[0] == 0.5 == self.image_mean[0]:
            return signed
        return ((signed + 1) / 2 - self.image_mean[0]) / self.image_std[0]
