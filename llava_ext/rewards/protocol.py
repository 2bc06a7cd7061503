"""The protocol of rewards."""

from collections.abc import Sequence
from typing import Protocol

from PIL.Image import Image


class Reward(Protocol):
    """A function that scores images, each for the prompt at the same index; higher is better.

    The score of an image depends only on the image and its prompt. An object that needs weights loads them when it is
    created, so that missing ones are reported before anything is drawn.
    """

    def __call__(self, prompts: Sequence[str], images: Sequence[Image]) -> Sequence[float]:
        """Score R images (RGB) for R prompts.

        Raises:
            UserError: a prompt that the reward cannot judge.
        """
        ...
