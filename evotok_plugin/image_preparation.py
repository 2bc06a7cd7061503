"""Steps from an upright RGB image to pixel values, shared by all image processors; independent of transformers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from evotok_plugin.errors import UserError

_LARGEST_SIDE = 65_536  # pixels; a typing error beyond it would exhaust the memory


def crop_square(picture: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side of an RGB image to `size` (bicubic) and crop the center.

    A square image that was enlarged by a whole factor without smoothing is reduced exactly.
    """
    if picture.size == (size, size):
        return picture
    original = _reduced_exactly(picture, size)
    if original is not None:
        return original
    return ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC)  # crops before it resizes


def _reduced_exactly(picture: Image.Image, size: int) -> "Image.Image | None":
    """The picture of `size` x `size` pixels whose enlargement by a whole factor, without smoothing, is `picture`.

    Bicubic filtering would change its pixels, and so the codes of an image that this project has drawn and enlarged.

    Returns:
        None if `picture` is not such an enlargement.
    """
    factor = picture.width // size
    if factor < 2 or picture.size != (factor * size, factor * size):
        return None
    blocks = np.asarray(picture).reshape(size, factor, size, factor, 3)
    corners = blocks[:, :1, :, :1]
    # The first row of blocks rejects nearly all other pictures.
    if (blocks[:1] == corners[:1]).all() and (blocks == corners).all():
        return Image.fromarray(corners.reshape(size, size, 3))
    return None


def side_of(size: "int | dict[str, int]") -> int:
    """Return the side length in pixels that a processor's `size` specifies.

    Raises:
        UserError: it is not a positive number of pixels, too large, or height and width differ.
    """
    side: object = size
    if isinstance(size, dict):
        values = set(size.values())
        is_square = set(size) in ({"shortest_edge"}, {"height", "width"}) and len(values) == 1
        side = values.pop() if is_square else None
    if not isinstance(side, int) or isinstance(side, bool) or not 1 <= side <= _LARGEST_SIDE:
        raise UserError(
            f"size must be a positive number of pixels up to {_LARGEST_SIDE}, {{'shortest_edge': pixels}} or an equal "
            f"height and width, got {size!r}"
        )
    return side


def flat_images(images: Any) -> list[Any]:
    """Flatten nested lists and batches (arrays and tensors of 4 dimensions) to a list of images."""
    if isinstance(images, (list, tuple)):
        return [image for part in images for image in flat_images(part)]
    return list(images) if getattr(images, "ndim", None) == 4 else [images]


def picture_values(picture: Image.Image, do_rescale: bool = True, do_normalize: bool = True) -> Tensor:
    """Convert an RGB image to float values (3, H, W): in [-1, 1], in [0, 1] without normalization, else in 0..255."""
    values = torch.from_numpy(np.array(picture, dtype=np.float32)).permute(2, 0, 1)
    if do_normalize:
        return values / 127.5 - 1.0
    return values / 255 if do_rescale else values


def check_pixel_range(pixel_range: "Sequence[float]") -> None:
    """Check the values of a black and of a white pixel.

    Raises:
        UserError: they are not two increasing numbers.
    """
    if len(pixel_range) != 2 or not pixel_range[0] < pixel_range[1]:
        raise UserError(f"pixel_range: expected the values of black and white, such as (0, 1), got {pixel_range!r}")


def to_signed_range(pixel_values: Tensor, pixel_range: "Sequence[float]") -> Tensor:
    """Scale pixel values from `pixel_range`, the values of black and white, to [-1, 1]."""
    black, white = pixel_range
    if (black, white) == (-1, 1):
        return pixel_values
    return (pixel_values - black) * (2 / (white - black)) - 1
