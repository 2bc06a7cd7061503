"""From flat token ids to what the LLM steps over: residual tokens are folded, one step per image position.

B batch, T tokens of the flat sequence, S steps after folding, L levels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llava_ext.vocabulary import ResidualVocabulary


@dataclass
class FoldedSequence:
    """A batch with one step per text token and one per image position.

    Attributes:
        input_ids: (B, S); at a written position the id of its level-0 token.
        attention_mask: (B, S), 1 on real steps.
        labels: (B, S) or None; -100 where nothing is learned.
        written: (B, S), True at written positions.
        codes: (P, L), the codes of the P written positions in row-major order of `written`.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor | None
    written: Tensor
    codes: Tensor


def fold_residual_tokens(
    vocabulary: ResidualVocabulary, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None
) -> FoldedSequence:
    """Fold runs of L residual tokens into one step each; padding stays on the side where it was.

    Raises:
        ValueError: residual tokens that do not come as whole positions, level by level.
    """
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    residual = vocabulary.is_residual(input_ids)
    if not bool(residual.any()):
        empty = input_ids.new_zeros((0, vocabulary.num_levels))
        return FoldedSequence(input_ids, attention_mask, labels, residual, empty)

    run = input_ids[residual]
    levels = vocabulary.levels(run)
    if run.numel() % vocabulary.num_levels or bool(
        (levels.view(-1, vocabulary.num_levels) != torch.arange(vocabulary.num_levels, device=run.device)).any()
    ):
        raise ValueError(
            f"residual tokens must come position by position, {vocabulary.num_levels} levels each in order; "
            f"got {run.numel()} of them in another order (was an image cut in half?)"
        )
    codes = vocabulary.codes(run).view(-1, vocabulary.num_levels)

    keep = ~residual | (vocabulary.levels(input_ids) == 0)
    real = keep & attention_mask.bool()
    steps = int(real.sum(dim=1).max())
    left_padded = bool((attention_mask[:, 0] == 0).any())
    # A stable sort on "is it dropped" brings the kept steps together without changing their order.
    order = torch.argsort(real.long() if left_padded else (~real).long(), dim=1, stable=True)
    order = order[:, -steps:] if left_padded else order[:, :steps]
    mask = real.gather(1, order)
    pick = lambda values, fill: values.gather(1, order).masked_fill(~mask, fill)  # noqa: E731
    return FoldedSequence(
        input_ids=pick(input_ids, 0),
        attention_mask=mask.to(attention_mask.dtype),
        labels=None if labels is None else pick(labels, -100),
        written=residual.gather(1, order) & mask,
        codes=codes,
    )


def merge_features(embeddings: Tensor, where: Tensor, features: Tensor, what: str) -> Tensor:
    """Put `features` (P, D) into `embeddings` (B, S, D) at the P places where `where` (B, S) is True.

    Raises:
        ValueError: the number of places and of features differ.
    """
    places = int(where.sum())
    if places != features.shape[0]:
        raise ValueError(
            f"{places} {what} placeholders in the sequence but {features.shape[0]} image positions were given; "
            "every <image> needs its image and every image its <image>"
        )
    return embeddings.masked_scatter(where[..., None], features.to(embeddings.dtype))
