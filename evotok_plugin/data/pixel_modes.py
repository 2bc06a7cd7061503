"""Conversion of images in any color mode or array layout to 8-bit RGB.

The rules are the same for files, PIL images, arrays and tensors:

* The EXIF orientation is applied; with invalid EXIF data, images count as upright. ICC profiles are ignored.
* Transparency (alpha channels, transparent palette entries and colors) is composited on white.
* 16-bit gray ranges from 0 (black) to 65535 (white), 12-bit TIFF to 4095. Values of 32-bit integer images (mode `I`)
  must be within 0..65535 and are read as 16-bit. Images with values up to 255 only would turn black and are rejected.
* Floats range from 0 (black) to 1 (white). Boolean arrays are black and white, uint8 arrays range to 255, uint16 arrays
  to 65535, and the values of all other integer arrays must be within 0..255.
* Everything else raises a `UserError`. Values out of range are not clamped, except for floats by half a level.
"""

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from evotok_plugin.errors import UserError

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_OPAQUE = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # TIFF tags
_HALF_A_LEVEL = 0.5 / 255  # rounding errors of floats, due to interpolation and half precision
_CHANNELS = (1, 3, 4)


# PIL images -----------------------------------------------------------------------------------------------------


def upright_rgb(picture: Image.Image) -> Image.Image:
    """Convert a PIL image of any mode to a new, upright RGB image without metadata.

    Raises:
        UserError: an unknown mode, values outside the mode's range, or no pixels.
    """
    colorkey = _transparent_color(picture)
    picture.load()
    if not min(picture.size):
        raise UserError(f"the image has no pixels: {picture.width} x {picture.height}")
    rgb = _rgb(picture, colorkey)
    method = _UPRIGHT.get(_orientation(picture))
    if method is not None:
        rgb = rgb.transpose(method)
    elif rgb is picture:
        rgb = picture.copy()
    rgb.info = {}  # it includes the orientation, which must not be applied twice
    return rgb


def _orientation(picture: Image.Image) -> int:
    try:
        orientation = picture.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # the parser raises many types for invalid EXIF data; viewers show such images unrotated
        return 1
    return orientation if isinstance(orientation, int) else 1


def _transparent_color(picture: Image.Image) -> int | tuple[int, ...] | None:
    """Return the transparent color of a gray or RGB image, on the scale of its decoded pixels.

    Pillow returns the value stored in the PNG file, although it expands pixels of 2 and 4 bits to 8 and reduces 16-bit
    RGB to the high bytes. The depth of the file is known only before the pixels are decoded.
    """
    color = picture.info.get("transparency")
    if color is None or not (picture.mode in ("1", "L", "RGB", "F") or picture.mode.startswith("I")):
        return None  # alpha channels and palettes: Pillow's conversion to RGBA is right
    is_rgb = picture.mode == "RGB"
    if not (isinstance(color, tuple) and len(color) == 3 if is_rgb else isinstance(color, int)):
        raise UserError(f"the transparent color {color!r} does not fit an image of mode {picture.mode}")
    raw_mode = _raw_mode(picture)
    if raw_mode == "RGB;16B":
        return tuple(value >> 8 for value in color)
    if picture.mode == "1":
        return 255 if color else 0
    return color * {"L;2": 85, "L;4": 17}.get(raw_mode or "", 1) if not is_rgb else color


def _raw_mode(picture: Image.Image) -> str | None:
    tiles = getattr(picture, "tile", None)
    arguments = tiles[0][3] if tiles else None
    return arguments[0] if isinstance(arguments, tuple) else arguments


def _rgb(picture: Image.Image, colorkey: int | tuple[int, ...] | None) -> Image.Image:
    mode = picture.mode
    if mode in ("I", "F") or mode.startswith("I;16"):
        return _with_white(Image.fromarray(_gray_levels(picture)), _equal(picture, colorkey))
    if mode == "La":
        picture = picture.convert("LA")  # Pillow cannot convert La to RGBA directly
    if picture.has_transparency_data and colorkey is None:
        if mode == "P":
            picture = picture.copy()  # the conversion would modify the palette of the original
        return _on_white(picture.convert("RGBA"))
    if mode not in _OPAQUE:
        raise UserError(f"images of mode {mode!r} are not supported; convert the image to RGB")
    rgb = picture if mode == "RGB" else picture.convert("RGB")
    return _with_white(rgb, _equal(picture, colorkey))


def _on_white(rgba: Image.Image) -> Image.Image:
    background = Image.new("RGB", rgba.size, "white")
    background.paste(rgba, mask=rgba.getchannel("A"))
    return background


def _equal(picture: Image.Image, color: int | tuple[int, ...] | None) -> np.ndarray | None:
    """Mask (H, W) of the pixels of a gray or RGB image that have a color."""
    if color is None:
        return None
    equal = np.asarray(picture.convert("L") if picture.mode == "1" else picture) == np.asarray(color)
    return equal.all(axis=2) if equal.ndim == 3 else equal


def _with_white(picture: Image.Image, where: np.ndarray | None) -> Image.Image:
    rgb = picture.convert("RGB") if picture.mode != "RGB" else picture
    if where is None or not where.any():
        return rgb
    pixels = np.array(rgb)
    pixels[where] = 255
    return Image.fromarray(pixels)


def _gray_levels(picture: Image.Image) -> np.ndarray:
    """Convert 16-bit, 32-bit and float images to uint8 (H, W)."""
    tags = getattr(picture, "tag_v2", {})
    values = np.asarray(picture)
    if picture.mode == "F":
        levels = _levels_of_floats(values, "a float image (mode F)")
    else:
        white = 4095 if tags.get(_BITS_PER_SAMPLE) == (12,) else 65535
        levels = _levels_of_16_bits(values, white, f"an image of mode {picture.mode}")
    return 255 - levels if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else levels


# Arrays and tensors ---------------------------------------------------------------------------------------------


def rgb_of_array(image: np.ndarray | Tensor, channels_first: bool | None = None) -> Image.Image:
    """Convert an array or tensor (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels to an RGB image.

    Args:
        channels_first: position of the channels, by default inferred from the shape. If both the first and the last
            dimension are 1, 3 or 4, tensors are taken as (C, H, W) and arrays as (H, W, C).

    Raises:
        UserError: another shape or type, or values outside the range of the type.
    """
    values, name = _as_array(image)
    if channels_first is None:
        channels_first = _are_channels_first(values.shape, isinstance(image, Tensor))
    shape = values.shape
    if values.ndim == 3:
        values = np.moveaxis(values, 0, 2) if channels_first else values
    elif values.ndim == 2:
        values = values[..., None]
    if values.ndim != 3 or values.shape[2] not in _CHANNELS:
        raise UserError(f"expected an image of (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels, got {name}")
    if not values.size:
        raise UserError(f"the image has no pixels: shape {tuple(shape)}")
    levels = np.ascontiguousarray(_levels(values, name))
    if levels.shape[2] == 1:
        return Image.fromarray(levels[..., 0]).convert("RGB")
    return Image.fromarray(levels) if levels.shape[2] == 3 else _on_white(Image.fromarray(levels, "RGBA"))


def _as_array(image: np.ndarray | Tensor) -> tuple[np.ndarray, str]:
    """Values of an array or tensor, and a description for errors."""
    kind = "a tensor" if isinstance(image, Tensor) else "an array"
    name = f"{kind} of shape {tuple(image.shape)} and type {image.dtype}"
    if isinstance(image, Tensor):
        if image.layout != torch.strided or image.is_quantized or image.is_meta:
            raise UserError(f"expected a dense tensor, got {name} ({image.layout}, device {image.device})")
        image = image.detach().cpu()
        is_known = not image.is_floating_point() or image.dtype in (torch.float16, torch.float32, torch.float64)
        return (image if is_known else image.float()).numpy(), name  # NumPy has no bfloat16 or 8-bit floats
    return np.asarray(image), name


def _are_channels_first(shape: tuple[int, ...], is_tensor: bool) -> bool:
    if len(shape) != 3:
        return False
    first, last = shape[0] in _CHANNELS, shape[2] in _CHANNELS
    return first and (is_tensor or not last)


def _levels(values: np.ndarray, name: str) -> np.ndarray:
    """Convert values of any numeric type to uint8."""
    kind = values.dtype.kind
    if values.dtype == np.uint8:
        return values
    if kind == "b":
        return values.astype(np.uint8) * 255
    if kind == "f":
        return _levels_of_floats(values, name)
    if kind == "u" and values.dtype.itemsize == 2:
        return _levels_of_16_bits(values, 65535, name)
    if kind in "iu":
        low, high = values.min(), values.max()
        if low < 0 or high > 255:
            raise UserError(f"expected values of 0..255 in {name}, got {low}..{high}")
        return values.astype(np.uint8)
    raise UserError(f"expected a boolean, integer or float image, got {name}")


def _levels_of_floats(values: np.ndarray, name: str) -> np.ndarray:
    low, high = float(values.min()), float(values.max())
    if not (low >= -_HALF_A_LEVEL and high <= 1 + _HALF_A_LEVEL):  # also true for NaN
        raise UserError(f"expected values of 0..1 in {name}, got {low:.6g}..{high:.6g}; rescale the image")
    return (values.astype(np.float32).clip(0, 1) * 255).round().astype(np.uint8)


def _levels_of_16_bits(values: np.ndarray, white: int, name: str) -> np.ndarray:
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > white:
        raise UserError(f"expected values of 0..{white} in {name}, got {low}..{high}; convert the image to 8 bits")
    if 0 < high <= 255 and white == 65535:
        raise UserError(
            f"{name} has values of {low}..{high} only, where white is {white}: it would be read as black; "
            "save it as an 8-bit image"
        )
    return ((values.astype(np.uint32) * 255 + white // 2) // white).astype(np.uint8)
