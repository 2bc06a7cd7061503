"""Image files and bytes to RGB pictures and tensors; what is broken is said, never replaced."""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFile, UnidentifiedImageError
from torch import Tensor

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".avif"),
)


@contextlib.contextmanager
def _whole_pictures_only() -> Iterator[None]:
    """Other libraries tell Pillow to fill what is missing of a file with grey; here such a file is broken."""
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def open_picture(image: str | Path | bytes, name: str | None = None) -> Image.Image:
    """Read an image file, or the bytes of one, as RGB; `name` is what an error calls it.

    Raises:
        ValueError: it is missing or broken.
    """
    name = name or (f"image of {len(image)} bytes" if isinstance(image, bytes) else str(image))
    try:
        with _whole_pictures_only(), Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as picture:
            return picture.convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"image {name!r} does not exist") from None
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(f"image {name!r} cannot be read: {error}") from error


def as_bytes(picture: Image.Image) -> Tensor:
    """An RGB picture as uint8 (3, H, W)."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def to_pixel_values(batch: Tensor, device: torch.device) -> Tensor:
    """uint8 (B, 3, H, W) to [-1, 1] on the device."""
    return batch.to(device, torch.float32, non_blocking=True) / 127.5 - 1.0
