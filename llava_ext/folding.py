"""Folding of flat token sequences into LLM steps: the L residual tokens of a position become one step.

With the flat head, sequences pass through without folding, one step per residual token. The module also merges image
features into the embeddings of a folded sequence and counts what is learned from its labels.

B batch, T tokens of the flat sequence, S steps after folding, P written positions (of drawn images), L levels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from evotok_plugin.errors import UserError
from llava_ext.vocabulary import ResidualVocabulary


@dataclass
class FoldedSequence:
    """A batch with one step per text token and one per image position, or one per residual token.

    Attributes:
        input_ids: (B, S); at a written position the id of its level-0 token.
        segment_ids: (B, S), 0 on padding; in packed rows each sample has its own number.
        labels: (B, S) or None; -100 where nothing is learned, such as at the first step of a sample, which has no
            predecessor.
        written: (B, S), True at written steps.
        codes: (P, L), codes of the written positions in row-major order of `written`.
    """

    input_ids: Tensor
    segment_ids: Tensor
    labels: Tensor | None
    written: Tensor
    codes: Tensor

    @property
    def attention_mask(self) -> Tensor:
        """(B, S), 1 on real steps."""
        return (self.segment_ids > 0).to(self.input_ids.dtype)

    @property
    def starts(self) -> Tensor:
        """(B, S), True at the first step of each sample and of each run of padding."""
        return segment_starts(self.segment_ids)

    @property
    def position_ids(self) -> Tensor:
        """(B, S), index of each step within its sample; transformers detects packed samples by its restarts."""
        return _steps_since(self.starts)

    def written_positions(self, steps_per_image: int) -> Tensor:
        """Index of each written step within its image; after folding (P,), the row-major positions in the image.

        Raises:
            UserError: an image with more or fewer steps than `steps_per_image`.
        """
        before = torch.cat([torch.zeros_like(self.written[:, :1]), self.written[:, :-1]], dim=1)
        first = self.written & (~before | self.starts)
        positions = _steps_since(first)[self.written]
        if bool((positions >= steps_per_image).any()) or int(first.sum()) * steps_per_image != positions.numel():
            raise UserError(
                f"{positions.numel()} drawn steps in {int(first.sum())} images, expected {steps_per_image} in each "
                "image"
            )
        return positions

    def as_one_row(self) -> "FoldedSequence":
        """Concatenate all samples in a batch of one row, without padding."""
        real = self.segment_ids > 0
        row = torch.arange(real.shape[0], device=real.device)[:, None] * (self.segment_ids.max() + 1)
        return FoldedSequence(
            input_ids=self.input_ids[real][None],
            segment_ids=(self.segment_ids + row)[real][None],
            labels=None if self.labels is None else self.labels[real][None],
            written=self.written[real][None],
            codes=self.codes,
        )


def segment_starts(segment_ids: Tensor) -> Tensor:
    """Mask (B, S) of the steps whose segment id (B, S) differs from the previous one, and of the first step of each
    row."""
    first = torch.ones_like(segment_ids[:, :1], dtype=torch.bool)
    return torch.cat([first, segment_ids[:, 1:] != segment_ids[:, :-1]], dim=1)


def _steps_since(marks: Tensor) -> Tensor:
    """(B, S), number of steps since the last mark in the row."""
    steps = torch.arange(marks.shape[1], device=marks.device).expand(marks.shape)
    return steps - steps.masked_fill(~marks, 0).cummax(dim=1).values


def fold_residual_tokens(
    vocabulary: ResidualVocabulary,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    segment_ids: Tensor | None = None,
    fold: bool = True,
    pad_left: bool = False,
) -> FoldedSequence:
    """Fold every L residual tokens into one step; padding stays on its side.

    Args:
        input_ids: (B, T).
        attention_mask: (B, T); None without padding.
        labels: (B, T), -100 where nothing is learned.
        segment_ids: (B, T), sample of each token within its row, numbered from 1; 0 is padding. Replaces
            `attention_mask`.
        fold: False keeps one step per residual token: only checks and marks them.
        pad_left: put padding that results from folding on the left; by default it goes to the side of the existing
            padding, or to the right.

    Raises:
        UserError: residual tokens that do not form complete positions, level by level.
    """
    if segment_ids is None:
        segment_ids = torch.ones_like(input_ids)
        if attention_mask is not None:  # longer than the tokens if it includes those in a cache
            segment_ids = attention_mask[:, -input_ids.shape[1] :].to(input_ids.dtype)
    if labels is not None:
        labels = labels.masked_fill(segment_starts(segment_ids), -100)
    residual = vocabulary.is_residual(input_ids)
    if not bool(residual.any()):
        empty = input_ids.new_zeros((0, vocabulary.num_levels))
        return FoldedSequence(input_ids, segment_ids, labels, residual, empty)

    run = input_ids[residual]
    levels = vocabulary.levels(run)
    if run.numel() % vocabulary.num_levels or bool(
        (levels.view(-1, vocabulary.num_levels) != torch.arange(vocabulary.num_levels, device=run.device)).any()
    ):
        raise UserError(
            f"residual tokens must come position by position, {vocabulary.num_levels} levels each in order; "
            f"got {run.numel()} of them in another order (was an image cut in half?)"
        )
    codes = vocabulary.codes(run).view(-1, vocabulary.num_levels)
    if not fold:
        return FoldedSequence(input_ids, segment_ids, labels, residual, codes)

    keep = ~residual | (vocabulary.levels(input_ids) == 0)
    real = keep & (segment_ids > 0)
    steps = int(real.sum(dim=1).max())
    left_padded = pad_left or bool((segment_ids[:, 0] == 0).any())
    # A stable sort by "is dropped" brings the kept steps together without changing their order.
    order = torch.argsort(real.long() if left_padded else (~real).long(), dim=1, stable=True)
    order = order[:, -steps:] if left_padded else order[:, :steps]
    mask = real.gather(1, order)

    def pick(values: Tensor, fill: int) -> Tensor:
        return values.gather(1, order).masked_fill(~mask, fill)

    return FoldedSequence(
        input_ids=pick(input_ids, 0),
        segment_ids=pick(segment_ids, 0),
        labels=None if labels is None else pick(labels, -100),
        written=residual.gather(1, order) & mask,
        codes=codes,
    )


def sequence_of_embeddings(
    vocabulary: ResidualVocabulary, embeddings: Tensor, attention_mask: Tensor | None, labels: Tensor | None, fold: bool
) -> FoldedSequence:
    """Describe a sequence that is given as embeddings (B, S, D), of whose tokens only the labels are known.

    Args:
        attention_mask: (B, S); None without padding. A cache may make it longer.
        labels: (B, S), -100 where nothing is learned.
        fold: whether the L residual tokens of a position are one step, for which one label is not enough.

    Raises:
        ValueError: labels of another shape, or labels of residual tokens that are folded.
    """
    steps = embeddings.shape[:2]
    if labels is not None and labels.shape != steps:
        raise ValueError(f"expected labels {tuple(steps)} for inputs_embeds, got {tuple(labels.shape)}")
    segment_ids = torch.ones(steps, dtype=torch.long, device=embeddings.device)
    if attention_mask is not None:
        segment_ids = attention_mask[:, -steps[1] :].to(torch.long)
    ids = torch.zeros_like(segment_ids)
    if labels is not None:
        labels = labels.masked_fill(segment_starts(segment_ids), -100)
        ids = labels.clamp(min=0)
    written = vocabulary.is_residual(ids) if labels is not None else torch.zeros_like(ids, dtype=torch.bool)
    if fold and bool(written.any()):
        raise ValueError("labels of residual tokens need input_ids: the tokens of a position are one step")
    return FoldedSequence(ids, segment_ids, labels, written, ids.new_zeros((0, vocabulary.num_levels)))


def merge_features(embeddings: Tensor, where: Tensor, features: Tensor, what: str) -> Tensor:
    """Replace `embeddings` (B, S, D) by `features` (P, D) at the P steps where `where` (B, S) is True.

    Args:
        what: kind of the features, for the error message.

    Raises:
        UserError: the numbers of steps and of features differ.
    """
    count = int(where.sum())
    if count != features.shape[0]:
        raise UserError(
            f"{count} {what} placeholders in the sequence but {features.shape[0]} image positions were given; "
            "every <image> needs its image and every image its <image>"
        )
    return embeddings.masked_scatter(where[..., None], features.to(embeddings.dtype))


@dataclass(frozen=True)
class LearnedCounts:
    """Numbers of learned text tokens and image positions in a batch, as scalar tensors."""

    text_tokens: Tensor
    image_positions: Tensor


def count_learned(labels: Tensor, vocabulary: ResidualVocabulary, segment_ids: Tensor | None = None) -> LearnedCounts:
    """Count the text tokens and image positions that are learned from labels (B, T), flat or folded.

    The first token of a sample is not counted: it has no predecessor that could predict it.

    Args:
        segment_ids: (B, T) of packed rows, or the attention mask; without it, each row is one sample without padding
            on the left.
    """
    starts = segment_starts(torch.zeros_like(labels) if segment_ids is None else segment_ids)
    learned, residual = (labels != -100) & ~starts, vocabulary.is_residual(labels)
    return LearnedCounts(
        text_tokens=(learned & ~residual).sum(),
        image_positions=(learned & residual & (vocabulary.levels(labels) == 0)).sum(),
    )
