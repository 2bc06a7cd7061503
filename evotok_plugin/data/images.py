"""The reader of images: files, bytes, data URIs, PIL images, arrays and tensors to upright 8-bit RGB.

All images in training, encoding, evaluation, chat, the demo page, lmms-eval and its judges pass through `open_picture`
or `as_picture`, so that all use the same pixels; `pixel_modes` defines the rules for colors, transparency and ranges.
"""

import base64
import io
import os
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import BinaryIO
from urllib.parse import unquote, unquote_to_bytes

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError
from torch import Tensor

from evotok_plugin.common.foreign_files import open_regular
from evotok_plugin.data.pixel_modes import rgb_of_array, upright_rgb
from evotok_plugin.errors import UserError

_SUFFIXES = {  # by supported format; only the first image of an animation or multi-page file is read
    "PNG": (".png", ".apng"),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "DIB": (".dib",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "AVIF": (".avif",),
    "JPEG2000": (".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c"),
}
FORMATS = tuple(_SUFFIXES)  # Pillow's other parsers are never used, whatever a file's name (EPS starts Ghostscript)
IMAGE_SUFFIXES = tuple(suffix for suffixes in _SUFFIXES.values() for suffix in suffixes)

READER_VERSION = 1
"""Version of the rules that map a file to pixels (orientation, colors, transparency, ranges). Increment it whenever a
rule changes: code caches and statistics of other versions are then rejected."""

MAX_PIXELS = 89_478_485
"""Largest number of pixels in an image file, checked before decoding; the default is Pillow's threshold for warnings.
Assign a larger number to `evotok_plugin.data.images.MAX_PIXELS` to read larger images."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_DATA_URI, _FILE_URL = re.compile(r"\s*data:", re.IGNORECASE), re.compile(r"file:", re.IGNORECASE)
# First base64 characters of PNG, JPEG, GIF, WebP, BMP, TIFF, AVIF or JPEG 2000, JPEG 2000 codestreams, PPM.
_STARTS = r"iVBORw0KGgo|/9j/|R0lGOD|UklGR|Qk|SUkqA|TU0AK|AAAA|/0//U|UD[QUY][Kg]"
# The lookahead never gives back characters, as a possessive quantifier, which Python 3.10 lacks.
_BASE64 = re.compile(rf"\s*(?:{_STARTS})(?=([A-Za-z0-9+/\s]{{60,}}))\1={{0,2}}\s*")


def open_picture(
    image: str | os.PathLike | bytes,
    name: str | None = None,
    *,
    max_pixels: int | None = None,
    formats: Sequence[str] = FORMATS,
) -> Image.Image:
    """Read an image file, or the bytes of one, as an upright RGB image without metadata.

    Args:
        image: a path, the content of a file, or a string with a `file:` URL, a data URI or plain base64.
        name: identifies the image in error messages.
        max_pixels: the limit of width x height; `MAX_PIXELS` by default.
        formats: Pillow's names of the accepted formats.

    Raises:
        UserError: the file is missing, not a regular file, of another format, too large or broken.
    """
    name = _shortened(name or (f"image of {len(image)} bytes" if isinstance(image, bytes) else str(image)))
    try:
        content: str | os.PathLike | bytes = image
        if isinstance(image, str):
            embedded = embedded_content(image)
            content = local_file(image) if embedded is None else embedded
        if isinstance(content, bytes):
            return _decode(io.BytesIO(content), name, max_pixels or MAX_PIXELS, formats)
        with open_regular(content) as file:
            return _decode(file, name, max_pixels or MAX_PIXELS, formats)
    except FileNotFoundError:
        raise UserError(f"image {name!r} does not exist") from None
    except _RejectedImage:
        raise
    except Exception as error:  # decoders raise many types, including RuntimeError, struct.error and MemoryError
        raise UserError(f"image {name!r} cannot be read: {_cause(error)}") from error


def as_picture(image: object, channels_first: bool | None = None) -> Image.Image:
    """Convert any representation of an image to an upright RGB image.

    Args:
        image: a PIL image of any mode, an argument of `open_picture`, or an array or tensor as for `rgb_of_array`.
        channels_first: position of the channels of arrays and tensors; by default inferred from the shape.

    Raises:
        UserError: another type, a broken image, or values outside the range of their type.
    """
    if isinstance(image, Image.Image):
        try:
            with _strict_decoding(0):
                return upright_rgb(image)
        except Exception as error:  # images opened elsewhere are decoded only here
            raise UserError(f"the image cannot be read: {_cause(error)}") from error
    if isinstance(image, (str, os.PathLike, bytes, bytearray)):
        return open_picture(bytes(image) if isinstance(image, bytearray) else image)
    if isinstance(image, Tensor) or hasattr(image, "__array__"):
        return rgb_of_array(image if isinstance(image, Tensor) else np.asarray(image), channels_first)
    raise UserError(
        f"expected a PIL image, a path, the bytes of a file, an array or a tensor, got {type(image).__name__}"
    )


# Strings --------------------------------------------------------------------------------------------------------


def is_embedded(text: str) -> bool:
    """Whether a string contains an image, as a data URI or plain base64, instead of naming one."""
    return bool(_DATA_URI.match(text) or (_BASE64.fullmatch(text) and not os.path.lexists(text[:4096])))


def embedded_content(text: str, is_base64: bool = False) -> bytes | None:
    """Decode the content of the image in a string; None if the string names an image instead.

    Args:
        text: a data URI (of any media type; the format is detected), base64 of an image, a path or a URL.
        is_base64: whether the string is known to be base64 or a data URI, whatever its first characters.

    Raises:
        UserError: the data URI or base64 cannot be decoded.
    """
    if not is_base64 and not is_embedded(text):
        return None
    if not _DATA_URI.match(text):
        content = _from_base64(text)
    else:
        head, comma, encoded = text.partition(",")
        if not comma:
            raise UserError("the data URI has no comma before its content")
        is_base64 = head.rstrip().lower().endswith(";base64")
        content = _from_base64(unquote(encoded)) if is_base64 else unquote_to_bytes(encoded)
    if not content:
        raise UserError("the embedded image is empty")
    return content


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError as error:  # characters outside ASCII, or binascii.Error
        raise UserError(f"its base64 content is broken ({error})") from None


def local_file(text: str) -> str:
    """Convert a string to a path: `file:` URLs are decoded, anything else is taken literally.

    `#` and `?` in a `file:` URL are part of the path, because image files have no fragments or queries.

    Raises:
        UserError: the URL of a file that is not on this machine.
    """
    if not _FILE_URL.match(text):
        if _URL.match(text):
            raise UserError("URLs are not fetched, only local files are read; download it first and give its path")
        return text
    path = text[5:]
    if path.startswith("//"):
        host, slash, path = path[2:].partition("/")
        if host.lower() not in ("", "localhost"):
            raise UserError(
                f"it is on host {_shortened(host)!r} and only local files are read; their URLs begin with file:///"
            )
        path = slash + path
    if not path:
        raise UserError("the file URL has no path")
    return unquote(path, errors="surrogateescape")


# Files ----------------------------------------------------------------------------------------------------------


class _RejectedImage(UserError):
    """Error whose message already names the image."""


def _decode(file: BinaryIO, name: str, max_pixels: int, formats: Sequence[str]) -> Image.Image:
    remedy = "; reduce it" + (" or raise evotok_plugin.data.images.MAX_PIXELS" if max_pixels == MAX_PIXELS else "")
    try:
        with _strict_decoding(max_pixels), Image.open(file, formats=_supported(tuple(formats))) as picture:
            if picture.width * picture.height > max_pixels:
                size = f"{picture.width} x {picture.height} pixels"
                raise _RejectedImage(f"image {name!r} has {size}, more than the {max_pixels:,} allowed{remedy}")
            return upright_rgb(picture)
    except UnidentifiedImageError as error:
        raise _RejectedImage(f"image {name!r} cannot be read: it is broken, or none of {', '.join(formats)}") from error
    except Image.DecompressionBombError as error:
        raise _RejectedImage(f"image {name!r} has far more than the {max_pixels:,} pixels allowed{remedy}") from error


@cache
def _supported(formats: tuple[str, ...]) -> tuple[str, ...]:
    """Remove formats unknown to Pillow (AVIF before release 11.3), because `Image.open` fails on their names."""
    Image.init()
    return tuple(kind for kind in formats if kind in Image.OPEN)


def _shortened(name: str) -> str:
    """Shorten long names, such as data URIs, for messages."""
    return name if len(name) <= 300 else f"{name[:80]}... ({len(name)} characters)"


def _cause(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())[:300]
    if not isinstance(error, (OSError, ValueError)):
        return f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text or type(error).__name__


class _Strictness:
    """State of Pillow's global settings for truncated and large files, which all threads share."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.lock, self.depth = threading.Lock(), 0
        self.before: tuple[bool, int | None] = (False, None)


_strictness = _Strictness()
if hasattr(os, "register_at_fork"):  # another thread may hold the lock when the process forks
    os.register_at_fork(after_in_child=_strictness.reset)


@contextmanager
def _strict_decoding(max_pixels: int) -> Iterator[None]:
    """Reject truncated images, which other libraries have Pillow fill with gray, and decode up to `max_pixels`.

    The first thread to enter changes the settings and the last to leave restores them; several can decode at once.
    """
    state = _strictness
    with state.lock:
        if not state.depth:
            state.before = (ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS)
        state.depth += 1
        ImageFile.LOAD_TRUNCATED_IMAGES = False
        if Image.MAX_IMAGE_PIXELS is not None:
            Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)
    try:
        yield
    finally:
        with state.lock:
            state.depth -= 1
            if not state.depth:
                ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = state.before
