"""Token sequence of a conversation before its images are inserted (layout) and after (encoded).

T tokens of the flat sequence.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from evotok_plugin.errors import UserError


@dataclass
class EncodedConversation:
    """Ids and labels of one conversation, both (T,); labels are -100 where nothing is learned."""

    input_ids: Tensor
    labels: Tensor


class TooLong(UserError):
    """A conversation that cannot be truncated to the requested length."""


@dataclass(frozen=True)
class ConversationLayout:
    """A conversation before its images are inserted: text tokens and one placeholder per image.

    Attributes:
        tokens: ids.
        learned: for each token, whether it is learned.
        is_image: for each token, whether it is the placeholder of an image.
        image_steps: number of LLM steps of each image, including its delimiters.
    """

    tokens: list[int]
    learned: list[bool]
    is_image: list[bool]
    image_steps: list[int]

    @property
    def num_steps(self) -> int:
        """Number of LLM steps: one per text token, plus those of the images."""
        return len(self.tokens) - len(self.image_steps) + sum(self.image_steps)

    def cut_to(self, num_steps: int) -> "ConversationLayout":
        """Truncate text at the end to `num_steps` LLM steps; images are never cut or dropped.

        Raises:
            TooLong: truncation would cut an image, or leave nothing to learn.
        """
        if self.num_steps <= num_steps:
            return self
        steps = np.ones(len(self.tokens), np.int64)
        steps[self.is_image] = self.image_steps
        kept = int(np.searchsorted(steps.cumsum(), num_steps, side="right"))
        if any(self.is_image[kept:]):
            raise TooLong(f"{self.num_steps} steps, and the first {num_steps} do not include all images completely")
        if not any(self.learned[:kept]):
            raise TooLong(f"{self.num_steps} steps, and the first {num_steps} contain nothing to learn")
        return ConversationLayout(self.tokens[:kept], self.learned[:kept], self.is_image[:kept], self.image_steps)
