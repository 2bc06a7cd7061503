"""Prompts that have been run through the language model, kept for further answers to the same prompt."""

import hashlib
from collections import OrderedDict
from collections.abc import Hashable
from itertools import compress
from typing import NamedTuple

import torch
from torch import Tensor

from llava_ext.generation.model_interface import ModelInterface
from llava_ext.generation.steps import Steps

_MAX_BYTES = 2**28
_MAX_PROMPTS = 64


class PromptCache:
    """The most recently used prompts, each as the steps of a single row; bounded in number and memory.

    It belongs to one set of weights: use a new one after the model has changed.
    """

    def __init__(self, max_bytes: int = _MAX_BYTES, max_prompts: int = _MAX_PROMPTS) -> None:
        """
        Args:
            max_bytes: limit of the memory of all keys and values; a longer prompt is not kept.
        """
        self._max_bytes, self._max_prompts = max_bytes, max_prompts
        self._kept: OrderedDict[Hashable, Steps] = OrderedDict()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable) -> Steps | None:
        """Return the steps after a prompt, None if they are not kept; they must not be advanced or changed."""
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def put(self, key: Hashable, steps: Steps) -> None:
        """Keep the steps of a single row, and drop the ones that have not been used for longest."""
        if (old := self._kept.pop(key, None)) is not None:
            self.num_bytes -= old.num_bytes
        if steps.num_bytes > self._max_bytes:
            return
        self._kept[key] = steps
        self.num_bytes += steps.num_bytes
        while self._kept and (self.num_bytes > self._max_bytes or len(self._kept) > self._max_prompts):
            _, dropped = self._kept.popitem(last=False)
            self.num_bytes -= dropped.num_bytes


class PromptKey(NamedTuple):
    """Identifies what the language model reads of a prompt: prompts with the same ids and images have equal keys.

    Attributes:
        ids: without padding.
        images: for each kind of image its name, shape and digest.
    """

    ids: tuple[int, ...]
    images: tuple[tuple[str, tuple[int, ...], bytes], ...]


def prompt_keys(model: ModelInterface, inputs: dict[str, Tensor]) -> list[PromptKey]:
    """Return the key of each row of inputs.

    Raises:
        UserError: the number of images does not match the placeholders.
    """
    images = model.images_of_rows(inputs)
    keys: list[PromptKey] = []
    rows = zip(inputs["input_ids"].tolist(), inputs["attention_mask"].tolist(), strict=True)
    for row, (ids, mask) in enumerate(rows):
        own = {name: of_rows[row] for name, of_rows in images.items()}
        digests = tuple((name, tuple(value.shape), _digest(value)) for name, value in own.items() if len(value))
        keys.append(PromptKey(tuple(compress(ids, mask)), digests))
    return keys


def _digest(values: Tensor) -> bytes:
    return hashlib.sha256(values.contiguous().cpu().view(torch.uint8).numpy().tobytes()).digest()
