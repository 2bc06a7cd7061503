"""Arguments of a processor call: text and images, positional or named, one, several or several per text."""

from collections.abc import Sequence
from typing import Any

from evotok_plugin.errors import UserError
from evotok_plugin.image_preparation import flat_images
from llava_ext.prompts.placeholders import LLAVA_IMAGE


def _ndim(value: object) -> int:
    return getattr(value, "ndim", None) or 0


def _is_several(value: object) -> bool:
    """Whether a value is a list, or a column of `datasets`, which is not one."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))


def _is_text(value: object) -> bool:
    return isinstance(value, str) or (
        isinstance(value, Sequence) and bool(value) and all(isinstance(one, str) for one in value)
    )


def text_and_images(inputs: tuple, text: Any, images: Any) -> tuple[Any, Any]:
    """Find text and images among positional and named arguments; positional videos and audio are None.

    Raises:
        ValueError: one of them is given twice, or cannot be distinguished from the other.
    """
    while len(inputs) > 2 and inputs[-1] is None:
        inputs = inputs[:-1]
    if len(inputs) > 2 or (len(inputs) == 2 and (text is not None or images is not None)):
        raise ValueError("expected text and images once each")
    if len(inputs) == 2:
        first, second = inputs
        if _is_text(first) and _is_text(second):
            raise ValueError("text and images are both strings; name them: processor(text=..., images=...)")
        return (first, second) if _is_text(first) or (first is None and not _is_text(second)) else (second, first)
    if inputs:
        if text is not None and images is not None:
            raise ValueError("expected text and images once each")
        if images is not None or (text is None and _is_text(inputs[0])):
            return inputs[0], images
        return text, inputs[0]
    return text, images


def as_texts(text: Any) -> list[str]:
    """Return one or several texts as a list.

    Raises:
        ValueError: anything else than strings.
    """
    texts = [text] if isinstance(text, str) else list(text) if _is_several(text) else []
    if not texts or not all(isinstance(one, str) for one in texts):
        raise ValueError("expected text as a string or a list of strings; pass messages to apply_chat_template")
    return texts


def _as_list(images: Any) -> list:
    """Return one or several images as a list; arrays and tensors with a batch axis are several."""
    if _is_several(images) or _ndim(images) > 3:
        return list(images)
    return [images]


def _is_nested(images: list) -> bool:
    return any(one is None or _is_several(one) or _ndim(one) > 3 for one in images)


def images_without_text(images: Any) -> list:
    """Flatten the images of a call without text, given as for `assign_images`; a row that is None has no images."""
    several = images if _is_several(images) else [images]
    return flat_images([row for row in several if row is not None])


def assign_images(counts: Sequence[int], images: Any) -> list:
    """Return images in the order of the placeholders.

    Args:
        counts: number of placeholders in each row.
        images: None, one image, a list in the order of the placeholders, or one list per row.

    Raises:
        UserError: the numbers of images and of placeholders differ, in total or, with one list per row, in a row.
    """
    several = [] if images is None else _as_list(images)
    if not _is_nested(several):
        check_count(sum(counts), len(several), "the text")
        return several
    if len(several) != len(counts):
        raise UserError(f"expected a list of images for each of {len(counts)} texts, got {len(several)} lists")
    rows = [[] if row is None else _as_list(row) for row in several]
    for number, (count, row) in enumerate(zip(counts, rows, strict=True)):
        check_count(count, len(row), f"text {number}")
    return [image for row in rows for image in row]


def check_count(num_placeholders: int, num_images: int, where: str) -> None:
    """Check that every placeholder has an image.

    Raises:
        UserError: the numbers differ.
    """
    if num_placeholders != num_images:
        raise UserError(f"{num_placeholders} {LLAVA_IMAGE} in {where} but {num_images} images were given")
