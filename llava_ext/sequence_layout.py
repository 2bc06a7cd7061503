"""A conversation as tokens before and after its images are put in.

T tokens of the flat sequence.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from evotok_plugin.errors import UserError


@dataclass
class EncodedConversation:
    """One conversation as ids and labels, both (T,); -100 marks what is not learned."""

    input_ids: Tensor
    labels: Tensor


class TooLong(UserError):
    """A conversation that cannot be cut to the length that is wanted."""


@dataclass(frozen=True)
class ConversationLayout:
    """A conversation before its images are put in: one token per text token and one per image.

    Attributes:
        tokens: ids.
        learned: which of them are learned.
        is_image: which of them stand for an image.
        image_steps: LLM steps that each image takes, its delimiters included.
    """

    tokens: list[int]
    learned: list[bool]
    is_image: list[bool]
    image_steps: list[int]

    @property
    def num_steps(self) -> int:
        """LLM steps: one per text token, and those of the images."""
        return len(self.tokens) - len(self.image_steps) + sum(self.image_steps)

    def cut_to(self, num_steps: int) -> "ConversationLayout":
        """Leave out from the end what exceeds `num_steps` LLM steps; images are kept, and whole.

        Raises:
            TooLong: an image, or all that would be learned, lies beyond.
        """
        if self.num_steps <= num_steps:
            return self
        steps = np.ones(len(self.tokens), np.int64)
        steps[self.is_image] = self.image_steps
        kept = int(np.searchsorted(steps.cumsum(), num_steps, side="right"))
        if any(self.is_image[kept:]):
            raise TooLong(f"{self.num_steps} steps, and the first {num_steps} do not hold all images whole")
        if not any(self.learned[:kept]):
            raise TooLong(f"{self.num_steps} steps, and the first {num_steps} hold nothing to learn")
        return ConversationLayout(self.tokens[:kept], self.learned[:kept], self.is_image[:kept], self.image_steps)
