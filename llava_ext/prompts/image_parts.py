"""Image parts of messages, as processors, OpenAI's API and data sets write them."""

import math
from collections.abc import Mapping

from evotok_plugin.errors import UserError

IMAGE_PARTS = ("image", "image_url")  # types of parts
PICTURE_KEYS = ("image", "image_url", "url", "path", "base64", "bytes")


def is_empty(value: object) -> bool:
    """Whether a field holds nothing: null, NaN (as pandas writes it), "", [], {} or a list or object of such values."""
    if isinstance(value, (list, tuple)):
        return all(map(is_empty, value))
    if isinstance(value, Mapping):
        return all(map(is_empty, value.values()))
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, (str, bytes)) and not value.strip())


def picture_in_part(part: Mapping) -> tuple[str, object]:
    """The picture of an image part and the key that it stands under, one of `PICTURE_KEYS`; ("", None) without one.

    The value of a key may be an object that holds the picture in turn, as in `{"image_url": {"url": ...}}`. A string
    under "bytes" is base64 and returned as such. A path beside bytes is their name, as in columns of `datasets.Image`.

    Raises:
        UserError: several pictures.
    """
    found = {key: part[key] for key in PICTURE_KEYS if not is_empty(part.get(key))}
    if "bytes" in found:
        found.pop("path", None)
    if not found:
        return "", None
    (key, first), *others = found.items()
    if not all(isinstance(first, str) and isinstance(other, str) and first == other for _, other in others):
        raise UserError(f"an image has one picture, got {' and '.join(map(repr, found))}")
    if isinstance(first, Mapping):
        return picture_in_part(first)
    return ("base64" if key == "bytes" and isinstance(first, str) else key), first
