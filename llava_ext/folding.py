"""From flat token ids to what the LLM steps over: residual tokens are folded, one step per image position, unless the
flat head takes them one by one.

B batch, T tokens of the flat sequence, S steps after folding, L levels.
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
        segment_ids: (B, S), 0 on padding; where samples are packed, another number for each of a row's samples.
        labels: (B, S) or None; -100 where nothing is learned, as at the first step of a sample: nothing stands before.
        written: (B, S), True at written steps.
        codes: (P, L), the codes of the P written positions in row-major order of `written`.
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
        """(B, S), True at the first step of every sample and of every run of padding."""
        return segment_starts(self.segment_ids)

    @property
    def position_ids(self) -> Tensor:
        """(B, S), each step's number within its sample; by its restarts transformers tells packed samples apart."""
        return _steps_since(self.starts)

    def written_positions(self, steps_per_image: int) -> Tensor:
        """Of every written step its place in its image; where positions are folded (P,), their places row-major.

        Raises:
            UserError: an image with more or fewer than `steps_per_image`.
        """
        before = torch.cat([torch.zeros_like(self.written[:, :1]), self.written[:, :-1]], dim=1)
        first = self.written & (~before | self.starts)
        places = _steps_since(first)[self.written]
        if bool((places >= steps_per_image).any()) or int(first.sum()) * steps_per_image != places.numel():
            raise UserError(
                f"{places.numel()} drawn steps in {int(first.sum())} images are no whole images of {steps_per_image} "
                "steps each"
            )
        return places

    def as_one_row(self) -> "FoldedSequence":
        """The same samples one after another in a batch of one, without padding."""
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
    """Where a number differs from the one before it in the row, and each row's first place; (B, S) both."""
    first = torch.ones_like(segment_ids[:, :1], dtype=torch.bool)
    return torch.cat([first, segment_ids[:, 1:] != segment_ids[:, :-1]], dim=1)


def _steps_since(marks: Tensor) -> Tensor:
    """(B, S), how many steps ago the last mark was."""
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
    """Fold runs of L residual tokens into one step each; padding stays on the side where it was.

    Args:
        pad_left: where padding goes that only folding makes; by default where padding is already, else on the right.
        fold: False where each residual token stays a step of its own: nothing moves, all is checked and marked alike.
        segment_ids: (B, T), which of its row's samples a token belongs to, numbered from 1; 0 is padding. Instead of
            `attention_mask`.

    Raises:
        UserError: residual tokens that do not come as whole positions, level by level.
    """
    if segment_ids is None:
        segment_ids = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids.dtype)
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
    # A stable sort on "is it dropped" brings the kept steps together without changing their order.
    order = torch.argsort(real.long() if left_padded else (~real).long(), dim=1, stable=True)
    order = order[:, -steps:] if left_padded else order[:, :steps]
    mask = real.gather(1, order)
    pick = lambda values, fill: values.gather(1, order).masked_fill(~mask, fill)  # noqa: E731
    return FoldedSequence(
        input_ids=pick(input_ids, 0),
        segment_ids=pick(segment_ids, 0),
        labels=None if labels is None else pick(labels, -100),
        written=residual.gather(1, order) & mask,
        codes=codes,
    )


def merge_features(embeddings: Tensor, where: Tensor, features: Tensor, what: str) -> Tensor:
    """Put `features` (P, D) into `embeddings` (B, S, D) at the P places where `where` (B, S) is True.

    Raises:
        UserError: the number of places and of features differ.
    """
    places = int(where.sum())
    if places != features.shape[0]:
        raise UserError(
            f"{places} {what} placeholders in the sequence but {features.shape[0]} image positions were given; "
            "every <image> needs its image and every image its <image>"
        )
    return embeddings.masked_scatter(where[..., None], features.to(embeddings.dtype))


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
