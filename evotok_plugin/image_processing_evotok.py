"""Images to `pixel_values` and back: all resizing, cropping and scaling happens here."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import TensorType

from evotok_plugin.configuration_evotok import EvoTokConfig
from evotok_plugin.data.images import as_picture
from evotok_plugin.errors import UserError
from evotok_plugin.image_preparation import crop_square, flat_images, picture_values, side_of

_HONORED = ("size", "do_resize", "do_rescale", "do_normalize", "input_data_format")
_FIXED = {  # keywords of transformers' image processors for which only one value is supported
    "crop_size": None,
    "data_format": "channels_first",
    "default_to_square": None,
    "device": "cpu",
    "disable_grouping": None,
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_pad": False,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "pad_size": None,
    "resample": Image.Resampling.BICUBIC,
    "rescale_factor": 1 / 255,
}
_WRITTEN_ON_SAVING = ("image_processor_type", "feature_extractor_type", "processor_class", "auto_map")
_CHANNELS_FIRST = {None: None, "channels_first": True, "channels_last": False}


class EvoTokImageProcessor(BaseImageProcessor):
    """Images to `pixel_values` (B, 3, size, size) in [-1, 1].

    Accepts PIL images of any mode, paths, base64 data URIs, file contents as bytes, arrays and tensors.
    `evotok_plugin.data.images.as_picture` applies the EXIF orientation, puts transparent images on white and scales
    values by their dtype. The shorter side is resized to `size` (bicubic), then the center is cropped. A square image
    that is enlarged by a whole factor without smoothing is reduced exactly.
    """

    model_input_names = ["pixel_values"]
    do_resize = do_rescale = do_normalize = True

    def __init__(self, size: int | dict[str, int] = 256, **kwargs: Any) -> None:
        settings = {key: kwargs.pop(key) for key in list(kwargs) if key not in _WRITTEN_ON_SAVING and key[0] != "_"}
        super().__init__(**kwargs)
        self.size = side_of(size)
        for key, value in settings.items():
            if key in ("do_resize", "do_rescale", "do_normalize"):
                setattr(self, key, bool(value))
            else:
                _check_fixed(key, value)

    def preprocess(
        self,
        images: Any,
        return_tensors: str | TensorType | None = "pt",
        *,
        size: int | dict[str, int] | None = None,
        do_resize: bool | None = None,
        do_rescale: bool | None = None,
        do_normalize: bool | None = None,
        input_data_format: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepare one image, a batch of images as one array or tensor (B, ...), or nested lists of images.

        Args:
            return_tensors: "pt" or "np"; with None, `pixel_values` is a list of tensors (3, H, W).
            size: overrides the processor's size: pixels, `{"shortest_edge": pixels}` or an equal height and width.
            do_resize: if False, images keep their size; unless `return_tensors` is None, all must have the same size.
            do_rescale: if False, the values of integer images stay in 0..255, which requires `do_normalize=False`.
            do_normalize: if False, values are in [0, 1].
            input_data_format: "channels_first" or "channels_last" for arrays and tensors; by default inferred from
                their shape.

        Raises:
            UserError: an input that is not an image, an image without pixels, or a keyword that is not supported.
        """
        self.check_keywords({**kwargs, "input_data_format": input_data_format})
        side = self.size if size is None else side_of(size)
        do_resize, do_rescale, do_normalize = (
            bool(own if given is None else given)
            for given, own in (
                (do_resize, self.do_resize),
                (do_rescale, self.do_rescale),
                (do_normalize, self.do_normalize),
            )
        )
        several = flat_images(images)
        if not several:
            raise UserError("expected at least one image, got none")
        pixels = []
        for image in several:
            if do_normalize and not do_rescale and not _is_float(image):
                raise UserError("do_rescale=False leaves 0..255, which do_normalize=True cannot take; disable both")
            picture = as_picture(image, _CHANNELS_FIRST[input_data_format])
            picture = self.crop(picture, side) if do_resize else picture
            pixels.append(picture_values(picture, do_rescale or _is_float(image), do_normalize))
        if return_tensors is None:
            return BatchFeature({"pixel_values": pixels})
        shapes = {tuple(values.shape) for values in pixels}
        if len(shapes) > 1:
            raise UserError(f"with do_resize=False, a batch needs images of one size, got {sorted(shapes)}")
        return BatchFeature({"pixel_values": torch.stack(pixels)}, tensor_type=return_tensors)

    def check_keywords(self, keywords: Mapping[str, Any]) -> None:
        """Check keywords of `preprocess` without an image.

        Raises:
            UserError: a keyword or a value that is not supported.
        """
        for key, value in keywords.items():
            if key == "size" and value is not None:
                side_of(value)
            elif key == "input_data_format" and value not in _CHANNELS_FIRST:
                raise UserError(f"expected input_data_format channels_first or channels_last, got {value!r}")
            elif key not in _HONORED:
                _check_fixed(key, value)

    def crop(self, picture: Image.Image, size: int | None = None) -> Image.Image:
        """Resize the shorter side to `size` (default: the processor's) and crop the center; returns RGB."""
        size = size or self.size
        picture = picture if picture.mode == "RGB" and not picture.info else as_picture(picture)
        return crop_square(picture, size)

    @staticmethod
    def to_pil(pixels: Tensor) -> list[Image.Image]:
        """Convert pixels (B, 3, H, W), clamped to [-1, 1], to PIL images."""
        values = pixels.detach().float().clamp(-1, 1).add_(1).mul_(127.5).round_().to(torch.uint8)
        return [Image.fromarray(image) for image in values.permute(0, 2, 3, 1).contiguous().cpu().numpy()]


def _check_fixed(key: str, value: object) -> None:
    if key not in _FIXED:
        known = ", ".join((*_HONORED, "return_tensors"))
        raise UserError(f"EvoTokImageProcessor has no setting {key!r}; it has {known}")
    fixed = _FIXED[key]
    value = list(value) if isinstance(value, tuple) else value
    if value is not None and str(value) != str(fixed) and value != fixed:
        raise UserError(f"EvoTokImageProcessor does not support {key}={value!r}; leave it out (it is {fixed!r})")


def _is_float(image: object) -> bool:
    if isinstance(image, Tensor):
        return image.is_floating_point()
    return getattr(getattr(image, "dtype", None), "kind", "") == "f"


def as_bytes(picture: Image.Image) -> Tensor:
    """Convert an RGB image to uint8 (3, H, W)."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def to_pixel_values(batch: Tensor, device: torch.device) -> Tensor:
    """Move uint8 images (B, 3, H, W) to a device and scale them to [-1, 1]."""
    return batch.to(device, torch.float32, non_blocking=True) / 127.5 - 1.0


# One class for both backends of transformers, which would warn that it falls back to the one that is registered.
AutoImageProcessor.register(
    EvoTokConfig,
    slow_image_processor_class=EvoTokImageProcessor,
    fast_image_processor_class=EvoTokImageProcessor,
    exist_ok=True,
)
