"""Records and cached codes to padded training batches.

B batch, T flat tokens, I images read in the batch, N positions, L levels.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from llava_ext.data.code_cache import CodeCache
from llava_ext.data.records import LLAVA_IMAGE, Record
from llava_ext.processing_evotok_llava import EvoTokLlavaProcessor


@dataclass
class Sample:
    """One encoded conversation; `read_codes` are the codes (N, L) of the images it reads, in order."""

    input_ids: Tensor
    labels: Tensor
    read_codes: list[Tensor]


class ConversationDataset(Dataset):
    """Encodes conversations on demand.

    For guidance, the user's text of a share `prompt_dropout` of the drawing samples is emptied; which ones changes
    from epoch to epoch and follows from (seed, epoch, index), so an interrupted run repeats its choices.
    """

    def __init__(
        self,
        records: Sequence[Record],
        processor: EvoTokLlavaProcessor,
        cache: CodeCache | None = None,
        max_length: int = 2048,
        prompt_dropout: float = 0.1,
        seed: int = 0,
    ) -> None:
        if not records:
            raise ValueError("no usable records: the data is empty or every record was left out")
        self.records = records
        self._processor, self._cache = processor, cache
        self._max_length, self._prompt_dropout, self._seed = max_length, prompt_dropout, seed
        self._epoch = 0

    def __len__(self) -> int:
        return len(self.records)

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def _drops_prompt(self, index: int) -> bool:
        return np.random.default_rng([self._seed, self._epoch, index]).random() < self._prompt_dropout

    def __getitem__(self, index: int) -> Sample:
        record = self.records[index]
        messages = list(record.messages)
        if record.kind == "draw" and self._drops_prompt(index):
            messages = [
                {"role": "user", "content": ""} if m["role"] == "user" and LLAVA_IMAGE not in m["content"] else m
                for m in messages
            ]
        codes = [self._cache.codes(name) for name in record.images]
        drawn = [c if is_drawn else None for c, is_drawn in zip(codes, record.drawn, strict=True)]
        encoded = self._processor.encode_conversation(messages, drawn)
        read = [c for c, is_drawn in zip(codes, record.drawn, strict=True) if not is_drawn]
        return self._truncate(Sample(encoded.input_ids, encoded.labels, read))

    def _truncate(self, sample: Sample) -> Sample:
        """Cut what exceeds the model's length, before an image rather than through it."""
        if sample.input_ids.shape[0] <= self._max_length:
            return sample
        end_id, start_id = self._processor.image_end_id, self._processor.image_start_id
        head = sample.input_ids[: self._max_length]
        starts, ends = (head == start_id).nonzero().flatten(), (head == end_id).nonzero().flatten()
        cut = int(starts[-1]) if len(starts) > len(ends) else self._max_length
        head = sample.input_ids[:cut]
        num_read = int((head == self._processor.image_token_id).sum()) // self._processor.num_positions
        return Sample(head, sample.labels[:cut], sample.read_codes[:num_read])


@dataclass
class Collator:
    """Samples to one right-padded batch of `input_ids`, `attention_mask`, `labels` (B, T) and `image_codes`
    (I, N, L; absent when nothing is read)."""

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


class ModalityGroupedSampler(Sampler[int]):
    """Shuffled batches of one kind each (read, draw, text), so that lengths in a batch are alike.

    The order follows from `seed` and the epoch alone. `epoch_of` is asked when iteration starts, because a resumed
    run never sees `set_epoch`.
    """

    def __init__(self, kinds: Sequence[str], batch_size: int, seed: int, epoch_of) -> None:
        self._kinds, self._batch_size, self._seed, self._epoch_of = list(kinds), batch_size, seed, epoch_of

    def __len__(self) -> int:
        return len(self._kinds)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self._seed, int(self._epoch_of())])
        order = rng.permutation(len(self._kinds))
        batches, rest = [], []
        for kind in sorted(set(self._kinds)):
            mine = [int(i) for i in order if self._kinds[i] == kind]
            whole = len(mine) - len(mine) % self._batch_size
            batches += [mine[i : i + self._batch_size] for i in range(0, whole, self._batch_size)]
            rest += mine[whole:]
        for index in rng.permutation(len(batches)):
            yield from batches[index]
        yield from rest
