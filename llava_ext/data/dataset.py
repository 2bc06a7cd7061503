"""Records and cached codes to padded training batches.

B batch, T flat tokens, I images read in the batch, N positions, L levels.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from evotok_plugin.data.code_cache.cache import CodeCache
from llava_ext.data.mixture import Mixture
from llava_ext.data.records import KINDS, Record
from llava_ext.data.survey import RecordTable
from llava_ext.placeholders import count_images
from llava_ext.processing_evotok_llava import EvoTokLlavaProcessor

_CLASSES_A_DOUBLING = 2  # of length
_WINDOW = 50  # batches that are sorted together


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
            raise ValueError("no usable records: the data is empty or every record was left out")
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


class EpochSampler(Sampler[int]):
    """The order that `order_of(epoch)` gives.

    `epoch_of` is asked when iteration starts, because a resumed run never sees `set_epoch`.
    """

    def __init__(self, order_of: Callable[[int], np.ndarray], length: int, epoch_of: Callable[[], float]) -> None:
        self._order_of, self._length, self._epoch_of = order_of, length, epoch_of

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        yield from self._order_of(int(self._epoch_of())).tolist()


class FilledSampler(Sampler):
    """Another sampler, filled up at its end to a multiple of `multiple` with what is not learned.

    Processes must make equally many micro-batches of one size. Left to itself, accelerate repeats samples of the
    epoch's beginning for that, which would be learned twice.
    """

    def __init__(self, sampler: Sampler, multiple: int) -> None:
        self._sampler, self._multiple = sampler, multiple

    def __len__(self) -> int:
        return -(-len(self._sampler) // self._multiple) * self._multiple

    def __iter__(self) -> Iterator:
        last = None
        for last in self._sampler:
            yield last
        # A sampler of packed rows yields lists; one sample is filler enough for a row.
        filler = [Filler(last[0])] if isinstance(last, list) else Filler(last)
        for _ in range(len(self) - len(self._sampler)):
            yield filler


class ModalityGroupedSampler(Sampler[int]):
    """Batches of one kind each (read, draw, text) and of samples that are about as long as each other.

    Of every window of 50 batches in the epoch's order, samples of a kind are sorted by length and cut into batches,
    whose order is then shuffled; what fills no batch waits for the next window. Lengths within a factor of 1.4 count as
    one: samples of exactly one length tend to be of one question, and batches of one question teach badly. All follows
    from the order, `seed` and the epoch. `epoch_of` is asked when iteration starts, because a resumed run never sees
    `set_epoch`.

    Args:
        kinds, lengths: of each sample (len,).
        batch_size: samples that go through the model at once, on all processes together.
        order_of: the order of an epoch's samples; by default they are shuffled.
    """

    def __init__(
        self,
        kinds: Sequence,
        batch_size: int,
        seed: int,
        epoch_of: Callable[[], float],
        lengths: Sequence[int] | None = None,
        order_of: Callable[[int], np.ndarray] | None = None,
    ) -> None:
        self._kinds, self._batch_size, self._seed, self._epoch_of = np.asarray(kinds), batch_size, seed, epoch_of
        lengths = np.ones(len(self._kinds)) if lengths is None else np.maximum(lengths, 1)
        self._classes = np.floor(_CLASSES_A_DOUBLING * np.log2(lengths)).astype(np.int32)
        self._order_of = order_of or Mixture([len(self._kinds)], seed=seed).order

    def __len__(self) -> int:
        return len(self._kinds)

    def __iter__(self) -> Iterator[int]:
        epoch = int(self._epoch_of())
        rng, order = np.random.default_rng([self._seed, epoch, 1]), self._order_of(epoch)
        window, waiting = _WINDOW * self._batch_size, order[:0]
        for start in range(0, len(order), window):
            batches, waiting = self._batches(np.concatenate([waiting, order[start : start + window]]))
            for number in rng.permutation(len(batches)):
                yield from batches[number].tolist()
        yield from waiting.tolist()

    def _batches(self, samples: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        """Whole batches, and the samples that are left over."""
        batches, rest = [], []
        for kind in np.unique(self._kinds[samples]):
            mine = samples[self._kinds[samples] == kind]
            whole = len(mine) - len(mine) % self._batch_size
            by_length = mine[:whole][np.argsort(self._classes[mine[:whole]], kind="stable")]
            batches += list(by_length.reshape(-1, self._batch_size))
            rest.append(mine[whole:])
        return batches, np.concatenate(rest)
