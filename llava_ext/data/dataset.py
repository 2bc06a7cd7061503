"""The data set of a stage: encodes records and cached codes to training samples.

N positions, L levels.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from evotok_plugin.data.code_cache import CodeCache
from evotok_plugin.errors import UserError
from llava_ext.data.mixture import Mixture
from llava_ext.data.record_table import RecordTable
from llava_ext.data.records import KINDS, Record
from llava_ext.processing_evotok_llava import EvoTokLlavaProcessor
from llava_ext.prompts.placeholders import count_images


@dataclass
class Sample:
    """An encoded conversation; `read_codes` are the codes (N, L) of the images that it reads, in order."""

    input_ids: Tensor
    labels: Tensor
    read_codes: list[Tensor]


@dataclass(frozen=True)
class Filler:
    """An index that returns sample `index` with all labels ignored, so that nothing is learned from it."""

    index: int


class Records(Protocol):
    """Records by number: a `RecordTable` or a list."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Record: ...
    def __iter__(self) -> Iterator[Record]: ...


class ConversationDataset(Dataset):
    """Encodes conversations on demand.

    For classifier-free guidance, the user's text before the last drawing is replaced by an empty prompt in a fraction
    `prompt_dropout` of the drawing samples. The choice depends on (seed, epoch, index) only, so that a resumed run
    repeats it.

    Args:
        records: their images must fit `max_length`; a longer text is truncated.
        cache: codes of all images; needed if any record has images.
        max_length: maximum LLM steps of a sample.
        mixture: the order of the records; by default they are shuffled.

    Raises:
        UserError: `records` is empty.
    """

    def __init__(
        self,
        records: Records,
        processor: EvoTokLlavaProcessor,
        cache: CodeCache | None = None,
        max_length: int = 2048,
        prompt_dropout: float = 0.1,
        seed: int = 0,
        mixture: Mixture | None = None,
    ) -> None:
        if not len(records):
            raise UserError("no usable records: the data is empty, or every record was left out")
        self.records = records
        self._processor, self._cache = processor, cache
        self._max_length, self._prompt_dropout, self._seed = max_length, prompt_dropout, seed
        self._mixture = mixture or Mixture([len(records)], seed=seed)
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # persistent data-loading processes see it

    def __len__(self) -> int:
        return len(self.records)

    @cached_property
    def kinds(self) -> np.ndarray:
        """The kind of each record (len,) as an index into `KINDS`, uint8."""
        if isinstance(self.records, RecordTable):
            return self.records.kinds
        return np.array([KINDS.index(record.kind) for record in self.records], np.uint8)

    @cached_property
    def lengths(self) -> np.ndarray:
        """LLM steps of each record (len,) after truncation, int32; an empty prompt takes fewer."""
        if isinstance(self.records, RecordTable):
            return self.records.lengths
        layouts = (self._processor.lay_out(record.messages, drawn=record.drawn) for record in self.records)
        return np.array([layout.cut_to(self._max_length).num_steps for layout in layouts], np.int32)

    def count_kinds(self) -> dict[str, int]:
        """The number of records of each kind."""
        return dict(zip(KINDS, np.bincount(self.kinds, minlength=len(KINDS)).tolist(), strict=True))

    @cached_property
    def reads(self) -> np.ndarray:
        """Whether each record (len,) reads an image."""
        if isinstance(self.records, RecordTable):
            return self.records.reads
        return np.array([record.reads for record in self.records], bool)

    def order(self, epoch: int) -> np.ndarray:
        """Record numbers (len,) of an epoch, in order; with weighted sources, some can repeat."""
        return self._mixture.order(epoch)

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def _drops_prompt(self, index: int) -> bool:
        return np.random.default_rng([self._seed, int(self._epoch), index]).random() < self._prompt_dropout

    def __getitem__(self, index: int | Filler) -> Sample:
        if isinstance(index, Filler):
            sample = self[index.index]
            return Sample(sample.input_ids, torch.full_like(sample.labels, -100), sample.read_codes)
        record = self.records[index]
        messages = list(record.messages)
        if record.kind == "draw" and self._drops_prompt(index):
            messages = _without_prompts(messages)
        layout = self._processor.lay_out(messages, drawn=record.drawn).cut_to(self._max_length)
        codes = [self._codes(name) for name in record.images]
        drawn = [c if is_drawn else None for c, is_drawn in zip(codes, record.drawn, strict=True)]
        encoded = self._processor.put_images(layout, drawn)
        read = [c for c, is_drawn in zip(codes, record.drawn, strict=True) if not is_drawn]
        return Sample(encoded.input_ids, encoded.labels, read)

    def _codes(self, name: str) -> Tensor:
        assert self._cache is not None, "records with images need a code cache"
        return self._cache.codes(name)


def _without_prompts(messages: list[dict]) -> list[dict]:
    """Replace the user's turns before the last drawing by empty text, except turns that show an image."""
    drawing = max(n for n, m in enumerate(messages) if m["role"] == "assistant" and count_images(m["content"]))
    return [
        {"role": "user", "content": ""} if m["role"] == "user" and not count_images(m["content"]) else m
        for m in messages[:drawing]
    ] + messages[drawing:]
