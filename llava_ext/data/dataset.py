"""Records and cached codes to padded training batches.

B batch, T flat tokens, I images read in the batch, N positions, L levels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from evotok_plugin.data.code_cache.cache import CodeCache
from evotok_plugin.errors import UserError
from llava_ext.data.mixture import Mixture
from llava_ext.data.record_scan import RecordTable
from llava_ext.data.records import KINDS, Record
from llava_ext.processing_evotok_llava import EvoTokLlavaProcessor
from llava_ext.prompts.placeholders import count_images


@dataclass
class Sample:
    """One encoded conversation; `read_codes` are the codes (N, L) of the images it reads, in order."""

    input_ids: Tensor
    labels: Tensor
    read_codes: list[Tensor]


@dataclass(frozen=True)
class Filler:
    """In place of a sample's number: the sample `index` once more, of which nothing is learned."""

    index: int


class ConversationDataset(Dataset):
    """Encodes conversations on demand.

    For guidance, the user's text before the last drawing is emptied in a share `prompt_dropout` of the drawing samples;
    in which ones changes from epoch to epoch and follows from (seed, epoch, index), so an interrupted run repeats its
    choices.

    Args:
        records: each fits `max_length`; a longer text is cut at its end.
        max_length: LLM steps of a sample.
        mixture: the order in which records are seen; without it they are shuffled.
    """

    def __init__(
        self,
        records: Sequence[Record],
        processor: EvoTokLlavaProcessor,
        cache: CodeCache | None = None,
        max_length: int = 2048,
        prompt_dropout: float = 0.1,
        seed: int = 0,
        mixture: Mixture | None = None,
    ) -> None:
        if not len(records):
            raise UserError("no usable records: the data is empty or every record was left out")
        self.records = records
        self._processor, self._cache = processor, cache
        self._max_length, self._prompt_dropout, self._seed = max_length, prompt_dropout, seed
        self._mixture = mixture or Mixture([len(records)], seed=seed)
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # data-loading processes may outlive an epoch

    def __len__(self) -> int:
        return len(self.records)

    @cached_property
    def kinds(self) -> np.ndarray:
        """Of each record (len,) its number in `KINDS`, uint8."""
        if isinstance(self.records, RecordTable):
            return self.records.kinds
        return np.array([KINDS.index(record.kind) for record in self.records], np.uint8)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Of each record (len,) its LLM steps once it is cut, int32; one whose prompt is emptied takes fewer."""
        if isinstance(self.records, RecordTable):
            return self.records.lengths
        layouts = (self._processor.lay_out(record.messages, drawn=record.drawn) for record in self.records)
        return np.array([layout.cut_to(self._max_length).num_steps for layout in layouts], np.int32)

    def count_kinds(self) -> dict[str, int]:
        """How many records there are of each kind."""
        return dict(zip(KINDS, np.bincount(self.kinds, minlength=len(KINDS)).tolist(), strict=True))

    @cached_property
    def reads(self) -> np.ndarray:
        """Of each record (len,) whether it reads an image."""
        if isinstance(self.records, RecordTable):
            return self.records.reads
        return np.array([record.reads for record in self.records], bool)

    def order(self, epoch: int) -> np.ndarray:
        """The records (len,) of an epoch by number, in their order; with weighted sources some come several times."""
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
        codes = [self._cache.codes(name) for name in record.images]
        drawn = [c if is_drawn else None for c, is_drawn in zip(codes, record.drawn, strict=True)]
        encoded = self._processor.put_images(layout, drawn)
        read = [c for c, is_drawn in zip(codes, record.drawn, strict=True) if not is_drawn]
        return Sample(encoded.input_ids, encoded.labels, read)


def _without_prompts(messages: list[dict]) -> list[dict]:
    """Messages with the user's turns before the last drawing emptied; a turn that shows an image stays."""
    drawing = max(n for n, m in enumerate(messages) if m["role"] == "assistant" and count_images(m["content"]))
    return [
        {"role": "user", "content": ""} if m["role"] == "user" and not count_images(m["content"]) else m
        for m in messages[:drawing]
    ] + messages[drawing:]
