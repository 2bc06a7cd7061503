"""Events of an answer while it is generated: new text, and images that start, progress and finish.

N positions, L levels, T tokens.
"""

from dataclasses import dataclass

from PIL.Image import Image
from torch import Tensor

from llava_ext.generation.selection import Choice


@dataclass(frozen=True)
class TextDelta:
    """New text of the answer in `row`; the deltas of a row, concatenated, are its text."""

    row: int
    text: str


@dataclass(frozen=True)
class ImageStarted:
    """The answer in `row` starts image number `index`, counted from 0."""

    row: int
    index: int


@dataclass(frozen=True)
class ImagePreview:
    """An image after `positions` of `num_positions`; the rest is gray."""

    row: int
    index: int
    image: Image
    positions: int
    num_positions: int


@dataclass(frozen=True)
class ImageDrawn:
    """A finished image and its codes (N, L), with the choice among its candidates if there were several."""

    row: int
    index: int
    image: Image
    codes: Tensor
    choice: Choice | None = None


@dataclass(frozen=True)
class CandidateDrawn:
    """A finished candidate for the image of an answer with `best_of`: its codes (N, L). Only the best one of the
    candidates is decoded, and becomes an `ImageDrawn`."""

    row: int
    codes: Tensor


@dataclass(frozen=True)
class Finished:
    """The answer in `row` is complete: its new ids (T,), made of text, delimiters and residual tokens, and the number
    of ids of its prompt."""

    row: int
    ids: Tensor
    num_prompt_ids: int = 0


Event = TextDelta | ImageStarted | ImagePreview | ImageDrawn | CandidateDrawn | Finished
