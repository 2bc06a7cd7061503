"""What is learned in a batch, and what a micro-batch contributes to an optimizer step.

The model's two losses are means over what is learned in its batch, as LLaVA's is. A plain average over the
micro-batches and ranks of a step lets a token count more where it stands among few: the three text tokens around a
drawn image, alone in their row, as much as a page in another row. `share_of_step` gives every learned token of a step
the same weight, and so the gradient that one batch of all of it would give.

B batch, T flat tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llava_ext.embedding_merge import segment_starts
from llava_ext.vocabulary import ResidualVocabulary


@dataclass(frozen=True)
class LearnedCounts:
    """How many text tokens and how many image positions are learned, in a batch or a step: scalar tensors."""

    text_tokens: Tensor
    image_positions: Tensor

    def __add__(self, other: "LearnedCounts") -> "LearnedCounts":
        return LearnedCounts(self.text_tokens + other.text_tokens, self.image_positions + other.image_positions)


def count_learned(labels: Tensor, vocabulary: ResidualVocabulary, segment_ids: Tensor | None = None) -> LearnedCounts:
    """What the model learns from labels (B, T), flat or folded.

    Args:
        segment_ids: (B, T) of packed rows, or the attention mask; without it, each row is one sample from its first
            place on. The first token of a sample is not learned: nothing stands before it.
    """
    starts = segment_starts(torch.zeros_like(labels) if segment_ids is None else segment_ids)
    learned, residual = (labels != -100) & ~starts, vocabulary.is_residual(labels)
    return LearnedCounts(
        text_tokens=(learned & ~residual).sum(),
        image_positions=(learned & residual & (vocabulary.levels(labels) == 0)).sum(),
    )


def share_of_step(
    output,
    in_step: LearnedCounts,
    num_parts: int,
    text_loss_weight: float = 1.0,
    image_loss_weight: float = 1.0,
) -> Tensor:
    """What one micro-batch contributes to a step, so that the mean over all parts is the loss of all of it together.

    Args:
        output: of the model, with `labels`.
        in_step: what is learned in all micro-batches of the step on all ranks.
        num_parts: how many losses are averaged: micro-batches of the step times ranks.
    """
    text = output.text_loss * (output.num_text_tokens / in_step.text_tokens.clamp(min=1))
    image = output.image_loss * (output.num_image_positions / in_step.image_positions.clamp(min=1))
    return num_parts * (text_loss_weight * text + image_loss_weight * image)
