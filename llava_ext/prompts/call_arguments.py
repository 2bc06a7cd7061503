"""Text and images as they are given to a processor: positional or named, one, several or several per text."""

from collections.abc import Sequence

from evotok_plugin.errors import UserError
from llava_ext.prompts.placeholders import LLAVA_IMAGE


def _ndim(value) -> int | None:
    return getattr(value, "ndim", None)


def _is_text(value) -> bool:
    return isinstance(value, str) or (
        isinstance(value, (list, tuple)) and bool(value) and all(isinstance(one, str) for one in value)
    )


def text_and_images(inputs: tuple, text, images) -> tuple:
    """Text and images from positional and named arguments."""
    if len(inputs) > 2 or (len(inputs) == 2 and (text is not None or images is not None)):
        raise UserError("expected text and images once each")
    if len(inputs) == 2:
        first, second = inputs
        if _is_text(first) and _is_text(second):
            raise UserError("text and images are both strings; name them: processor(text=..., images=...)")
        return (first, second) if _is_text(first) else (second, first)
    if inputs:
        if text is not None and images is not None:
            raise UserError("expected text and images once each")
        if images is not None or (text is None and _is_text(inputs[0])):
            return inputs[0], images
        return text, inputs[0]
    return text, images


def _as_list(images) -> list:
    """One image or several to a list; arrays and tensors with a leading axis are several."""
    if isinstance(images, (list, tuple)) or (_ndim(images) or 0) > 3:
        return list(images)
    return [images]


def _is_nested(images: list) -> bool:
    return any(one is None or isinstance(one, (list, tuple)) or (_ndim(one) or 0) > 3 for one in images)


def flat_images(images) -> list:
    several = _as_list(images)
    rows = [[] if row is None else _as_list(row) for row in several] if _is_nested(several) else [several]
    return [image for row in rows for image in row]


def assign_images(counts: Sequence[int], images) -> list:
    """Images in the order of the placeholders, of which each row has so many.

    Raises:
        UserError: another number of images than of placeholders, in all or, with a list per row, in one of them.
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
    if num_placeholders != num_images:
        raise UserError(f"{num_placeholders} {LLAVA_IMAGE} in {where} but {num_images} images were given")
