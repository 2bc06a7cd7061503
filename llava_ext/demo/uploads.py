"""Pictures that strangers give: small enough, whole, and rid of all that is not picture."""

import io
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from evotok_plugin.data.images import open_picture

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")  # decoders that are old and well tried, and no others


@dataclass(frozen=True)
class UploadLimits:
    """What a picture may have: bytes of the file in MB (2**20), and pixels once it is decoded."""

    max_mb: float = 10.0
    max_pixels: int = 16_000_000

    def __post_init__(self) -> None:
        if self.max_mb <= 0 or self.max_pixels < 1:
            raise ValueError(f"expected max_upload_mb above 0 and max_pixels of 1 or more, got {self}")

    @property
    def max_bytes(self) -> int:
        return int(self.max_mb * 2**20)


def open_upload(upload: str | Path | bytes, limits: UploadLimits, name: str | None = None) -> Image.Image:
    """An image file, or the bytes of one, as an upright RGB picture without any metadata.

    The size is read from the header before a pixel is decoded, so that a bomb does not go off.

    Args:
        name: what an error calls it.

    Raises:
        ValueError: too many bytes or pixels, no picture of a known format, or a broken one.
    """
    file = Path(upload) if isinstance(upload, str) else upload
    name = name or (f"image of {len(file)} bytes" if isinstance(file, bytes) else file.name)
    try:
        size = len(file) if isinstance(file, bytes) else file.stat().st_size
    except OSError as error:
        raise ValueError(f"image {name!r} cannot be read: {error.strerror}; upload it again") from error
    if size > limits.max_bytes:
        raise ValueError(f"image {name!r} has {size / 2**20:.1f} MB, more than the {limits.max_mb:g} MB allowed")
    _check_pixels(file, name, limits)
    try:
        picture = ImageOps.exif_transpose(open_picture(file, name))
    except (SyntaxError, struct.error, LookupError, TypeError) as error:
        raise ValueError(f"image {name!r} cannot be read: its EXIF data are broken ({error})") from error
    return Image.frombytes("RGB", picture.size, picture.tobytes())  # a new one: it has pixels and nothing else


def _check_pixels(file: Path | bytes, name: str, limits: UploadLimits) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is another one
            with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=_FORMATS) as picture:
                width, height = picture.size
    except Image.DecompressionBombError:
        raise ValueError(f"image {name!r} has far more than the {limits.max_pixels:,} pixels allowed") from None
    except (OSError, SyntaxError, ValueError, struct.error) as error:
        known = ", ".join(_FORMATS)
        raise ValueError(f"image {name!r} cannot be read: it is broken, or none of {known}") from error
    if width * height > limits.max_pixels:
        raise ValueError(
            f"image {name!r} has {width} x {height} pixels, more than the {limits.max_pixels:,} allowed; reduce it"
        )
