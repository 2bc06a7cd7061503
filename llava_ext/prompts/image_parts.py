"""Image parts of messages, in the forms of Hugging Face processors, OpenAI's API and datasets."""

import math
from collections.abc import Mapping

from evotok_plugin.errors import UserError

IMAGE_PARTS = ("image", "image_url")  # types of parts
PICTURE_KEYS = ("image", "image_url", "url", "path", "base64", "bytes")


def is_empty(value: object) -> bool:
    """Whether a field is empty: null, NaN (as written by pandas), "", [], {} or a list or object of such values."""
    if isinstance(value, (list, tuple)):
        return all(map(is_empty, value))
    if isinstance(value, Mapping):
        return all(map(is_empty, value.values()))
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, (str, bytes)) and not value.strip())


def picture_in_part(part: Mapping) -> tuple[str, object]:
    """Return the key, one of `PICTURE_KEYS`, and the picture of an image part; ("", None) without a picture.

    The value of a key may be an object that contains the picture, as in `{"image_url": {"url": ...}}`. A string under
    "bytes" is base64, and its key is returned as "base64". A path next to bytes is only their name, as in columns of
    `datasets.Image`.

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
        raise UserError(f"expected one picture, got {' and '.join(map(repr, found))}")
    if isinstance(first, Mapping):
        return picture_in_part(first)
    return ("base64" if key == "bytes" and isinstance(first, str) else key), first
