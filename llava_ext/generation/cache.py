"""A cache of keys and values for a batch of answers, allocated once at its full size.

Every step writes the next slot of all rows. Rows can be repeated (several images for one prompt), added and dropped
while generation continues; the attention mask decides which slots a row reads.

A layer returns only the slots that are filled, so that no step computes more than necessary. After `SlotCache.fix` it
returns all slots and writes to the slot that a tensor holds: steps then differ only in the contents of memory, so that
a CUDA graph can replay them.

G rows, S slots, h heads, d their width.
"""

from collections.abc import Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

_Part = TypeVar("_Part")


def runs_of_same(parts: Sequence[_Part]) -> list[tuple[slice, _Part]]:
    """The runs of the same object in `parts`, each with the slice of its places."""
    runs: list[tuple[slice, _Part]] = []
    for place, part in enumerate(parts):
        first = runs.pop()[0].start if runs and runs[-1][1] is part else place
        runs.append((slice(first, place + 1), part))
    return runs


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, (G, h, S, d)."""

    is_sliding = False
    keys: Tensor  # None in transformers until the first update
    values: Tensor

    def __init__(self, num_slots: int) -> None:
        super().__init__()
        self.num_slots, self.num_filled = num_slots, 0
        self.slot: Tensor | None = None  # (1,), where the next step is written, once the layer is fixed

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        def allocate(like: Tensor) -> Tensor:
            return like.new_zeros(*like.shape[:2], self.num_slots, like.shape[-1])

        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = allocate(key_states), allocate(value_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.slot is not None:
            self.keys.index_copy_(2, self.slot, key_states)
            self.values.index_copy_(2, self.slot, value_states)
            return self.keys, self.values
        start, end = self.num_filled, self.num_filled + key_states.shape[2]
        self.keys[:, :, start:end] = key_states
        self.values[:, :, start:end] = value_states
        self.num_filled = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.num_filled + query_length, 0

    def get_seq_length(self) -> int:
        return self.num_filled

    def get_max_length(self) -> int:
        return self.num_slots

    def get_max_cache_shape(self) -> int:
        """The name of `get_max_length` in earlier versions of transformers."""
        return self.num_slots

    def drop_last(self, count: int) -> None:
        """Free the last `count` filled slots; the next update overwrites them."""
        self.num_filled -= count

    def select_rows(self, rows: Tensor) -> None:
        """Keep the rows (G',) in this order; a row can be repeated."""
        self.keys, self.values = self.keys[rows], self.values[rows]

    def resize(self, num_filled: int, num_free: int) -> None:
        """Move the filled slots so that there are `num_filled` of them, dropping or adding slots on the left, and
        `num_free` slots after them."""
        kept = min(self.num_filled, num_filled)
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros(*old.shape[:2], num_filled + num_free, old.shape[-1])
            new[:, :, num_filled - kept : num_filled] = old[:, :, self.num_filled - kept : self.num_filled]
            setattr(self, name, new)
        self.num_filled, self.num_slots = num_filled, num_filled + num_free


class SlotCache(Cache):
    """The cache of a language model whose layers all use full attention."""

    def __init__(self, num_layers: int, num_slots: int) -> None:
        super().__init__(layers=[SlotLayer(num_slots) for _ in range(num_layers)])

    @classmethod
    def take_over(cls, cache: Cache, num_free: int) -> "SlotCache":
        """Move the keys and values of transformers' `DynamicCache`, which is empty afterwards, layer by layer, and make
        room for `num_free` further slots."""
        layers = [cast(Any, layer) for layer in cache.layers]
        made = cls(len(layers), layers[0].keys.shape[2] + num_free)
        for mine, theirs in zip(made.slot_layers, layers, strict=True):
            mine.update(theirs.keys, theirs.values)
            theirs.keys, theirs.values, theirs.is_initialized = None, None, False
        return made

    @property
    def slot_layers(self) -> list[SlotLayer]:
        return cast(list[SlotLayer], self.layers)  # `Cache` declares a union of transformers' layer types

    def fix(self) -> Tensor:
        """Make every layer write to the slot that the returned tensor (1,) holds."""
        first = self.slot_layers[0]
        slot = torch.tensor([first.num_filled], device=first.keys.device)
        for layer in self.slot_layers:
            layer.slot = slot
        return slot

    def select_rows(self, rows: Tensor) -> None:
        """Keep the rows (G',) in this order; a row can be repeated."""
        for layer in self.slot_layers:
            layer.select_rows(rows)

    def drop_last(self, count: int) -> None:
        """Free the last `count` filled slots of every layer."""
        for layer in self.slot_layers:
            layer.drop_last(count)

    def make_room(self) -> None:
        """Have at least one free slot; if there is none, twice as many slots."""
        first = self.slot_layers[0]
        if first.num_filled == first.num_slots:
            self.resize(first.num_filled, first.num_filled)

    def resize(self, num_filled: int, num_free: int) -> None:
        """Resize every layer, see `SlotLayer.resize`."""
        for layer in self.slot_layers:
            layer.resize(num_filled, num_free)

    @classmethod
    def joined(cls, parts: "Sequence[SlotCache]", num_filled: int, num_free: int) -> "SlotCache":
        """Join caches of one row each, aligned to the last filled slot; `num_filled` is at least that of each part."""
        made = cls(len(parts[0].layers), num_filled + num_free)
        runs = runs_of_same(parts)
        for number, layer in enumerate(made.slot_layers):
            like = parts[0].slot_layers[number].keys
            layer.lazy_initialization(*2 * (like.new_empty(len(parts), like.shape[1], 0, like.shape[3]),))
            for rows, part in runs:
                source = part.slot_layers[number]
                start = num_filled - source.num_filled
                layer.keys[rows, :, start:num_filled] = source.keys[:1, :, : source.num_filled]
                layer.values[rows, :, start:num_filled] = source.values[:1, :, : source.num_filled]
            layer.num_filled = num_filled
        return made

    def split(self, lengths: Sequence[int]) -> "list[SlotCache]":
        """Copy each row's last filled slots, as many as `lengths` says, to a cache of its own."""
        parts = [SlotCache(len(self.layers), length) for length in lengths]
        for row, (part, length) in enumerate(zip(parts, lengths, strict=True)):
            for mine, theirs in zip(self.slot_layers, part.slot_layers, strict=True):
                used = slice(mine.num_filled - length, mine.num_filled)
                theirs.update(mine.keys[row : row + 1, :, used], mine.values[row : row + 1, :, used])
        return parts

    @property
    def num_bytes(self) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.slot_layers)

    def add_rows(self, other: "SlotCache") -> None:
        """Append the rows of another cache, aligned to the last filled slot.

        Raises:
            ValueError: the other cache has more filled slots.
        """
        for mine, theirs in zip(self.slot_layers, other.slot_layers, strict=True):
            start = mine.num_filled - theirs.num_filled
            if start < 0:
                raise ValueError(f"{theirs.num_filled} filled slots do not fit into {mine.num_filled}")
            for name in ("keys", "values"):
                old, new = getattr(mine, name), getattr(theirs, name)
                rows = old.new_zeros(new.shape[0], *old.shape[1:])
                rows[:, :, start : mine.num_filled] = new[:, :, : theirs.num_filled]
                setattr(mine, name, torch.cat([old, rows]))
