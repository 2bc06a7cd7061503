"""How much is learned in a batch.

B batch, T flat tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llava_ext.embedding_merge import segment_starts
from llava_ext.vocabulary import ResidualVocabulary


@dataclass(frozen=True)
class LearnedCounts:
    """How many text tokens and how many image positions are learned in a batch: scalar tensors."""

    text_tokens: Tensor
    image_positions: Tensor


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
