"""Collators of samples to batches: one sample per row, or packed rows with segments.

B rows, T flat tokens, I images read in the batch, N positions, L levels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llava_ext.data.dataset import Sample
from llava_ext.processing_evotok_llava import EvoTokLlavaProcessor


@dataclass
class Collator:
    """Collate samples to a right-padded batch of `input_ids`, `attention_mask`, `labels` (B, T) and `image_codes`
    (I, N, L; absent if no image is read)."""

    processor: EvoTokLlavaProcessor

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        pad = self.processor.pad
        batch = {
            "input_ids": pad([s.input_ids for s in samples], 0, side="right"),
            "attention_mask": pad([torch.ones_like(s.input_ids) for s in samples], 0, side="right"),
            "labels": pad([s.labels for s in samples], -100, side="right"),
        }
        read = [codes for sample in samples for codes in sample.read_codes]
        if read:
            batch["image_codes"] = torch.stack(read)
        return batch


@dataclass
class PackedCollator:
    """Collate rows of samples to a right-padded batch of `input_ids`, `labels`, `segment_ids` (B, T) and `image_codes`
    (I, N, L; absent if no image is read).

    `segment_ids` number the samples of a row from 1 and are 0 on padding. The first token of a sample is never learned.
    """

    processor: EvoTokLlavaProcessor

    def __call__(self, rows: Sequence[Sequence[Sample]]) -> dict[str, Tensor]:
        def flat(values: Callable[[int, Sample], Tensor], fill: int) -> Tensor:
            joined = [torch.cat([values(number, sample) for number, sample in enumerate(row, 1)]) for row in rows]
            return self.processor.pad(joined, fill, side="right")

        batch = {
            "input_ids": flat(lambda _, sample: sample.input_ids, 0),
            "labels": flat(lambda _, sample: sample.labels, -100),
            "segment_ids": flat(lambda number, sample: torch.full_like(sample.input_ids, number), 0),
        }
        read = [codes for row in rows for sample in row for codes in sample.read_codes]
        if read:
            batch["image_codes"] = torch.stack(read)
        return batch
