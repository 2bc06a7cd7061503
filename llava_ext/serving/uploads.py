"""Untrusted uploads: size limits, few formats, metadata stripped."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from evotok_plugin.data.images import open_picture
from evotok_plugin.errors import UserError

WEB_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")  # accepted from the web: the most widely tested decoders


@dataclass(frozen=True)
class UploadLimits:
    """Limits of one image: size of the file in MB (2**20 bytes), and number of pixels."""

    max_mb: float = 10.0
    max_pixels: int = 16_000_000

    def __post_init__(self) -> None:
        if not 0 < self.max_mb < math.inf or self.max_pixels < 1:
            raise UserError(f"expected max_upload_mb above 0 and max_pixels of 1 or more, got {self}")

    @property
    def max_bytes(self) -> int:
        return int(self.max_mb * 2**20)


def open_upload(
    upload: str | Path | bytes, limits: UploadLimits, name: str | None = None, formats: Sequence[str] = WEB_FORMATS
) -> Image.Image:
    """Read an image file, or its bytes, as an upright RGB image without metadata.

    The number of pixels is read from the header and checked before anything is decoded.

    Args:
        name: name of the image in error messages.
        formats: formats that are accepted, by Pillow's names.

    Raises:
        UserError: the image has too many bytes or pixels, another format, or is broken.
    """
    file = Path(upload) if isinstance(upload, str) else upload
    name = name or (f"image of {len(file)} bytes" if isinstance(file, bytes) else file.name)
    try:
        size = len(file) if isinstance(file, bytes) else file.stat().st_size
    except OSError as error:
        raise UserError(f"image {name!r} cannot be read: {error.strerror}; upload it again") from error
    if size > limits.max_bytes:
        raise UserError(f"image {name!r} has {size / 2**20:.1f} MB, more than the {limits.max_mb:g} MB allowed")
    return open_picture(file, name, max_pixels=limits.max_pixels, formats=formats)
