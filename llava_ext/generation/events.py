"""What happens while an answer is written: text comes, images begin, take shape and are done.

N positions, L levels, T tokens.
"""

from dataclasses import dataclass

from PIL.Image import Image
from torch import Tensor


@dataclass(frozen=True)
class TextDelta:
    """More text of the answer in `row`; the pieces of a row in their order are its text."""

    row: int
    text: str


@dataclass(frozen=True)
class ImageStarted:
    """The answer in `row` begins image number `index`, counted from 0."""

    row: int
    index: int


@dataclass(frozen=True)
class ImagePreview:
    """An image after `positions` of `num_positions`; grey where nothing is drawn yet."""

    row: int
    index: int
    image: Image
    positions: int
    num_positions: int


@dataclass(frozen=True)
class ImageDrawn:
    """An image that is whole, and its codes (N, L)."""

    row: int
    index: int
    image: Image
    codes: Tensor


@dataclass(frozen=True)
class Finished:
    """The answer in `row` is complete: its new ids (T,), text, delimiters and residual tokens."""

    row: int
    ids: Tensor


Event = TextDelta | ImageStarted | ImagePreview | ImageDrawn | Finished
