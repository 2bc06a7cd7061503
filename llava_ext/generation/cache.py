"""Keys and values of everything a batch of answers has seen, in memory that is taken once.

A step of any row takes the next slot in all rows. Rows can be repeated (one prompt, several images), joined and dropped
while answers go on; which slots a row looks at is its mask's business.

A layer hands out the slots that are taken, so that no step computes more than it must. Once fixed (`SlotCache.fix`) it
hands out all of them and writes where a tensor says: nothing then changes from step to step but the contents of memory,
which is what a CUDA graph can repeat.

G rows, S slots, h heads, d their width.
"""

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from evotok_plugin.errors import UserError


class SlotLayer(CacheLayerMixin):
    """One layer's keys and values, (G, h, S, d)."""

    is_sliding = False

    def __init__(self, num_slots: int) -> None:
        super().__init__()
        self.num_slots, self.taken = num_slots, 0
        self.slot: Tensor | None = None  # (1,), where the next step goes, once the layer is fixed

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        def room(like: Tensor) -> Tensor:
            return like.new_zeros(*like.shape[:2], self.num_slots, like.shape[-1])

        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = room(key_states), room(value_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.slot is not None:
            self.keys.index_copy_(2, self.slot, key_states)
            self.values.index_copy_(2, self.slot, value_states)
            return self.keys, self.values
        start, end = self.taken, self.taken + key_states.shape[2]
        self.keys[:, :, start:end] = key_states
        self.values[:, :, start:end] = value_states
        self.taken = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.taken + query_length, 0

    def get_seq_length(self) -> int:
        return self.taken

    def get_max_length(self) -> int:
        return self.num_slots

    def get_max_cache_shape(self) -> int:
        """`get_max_length` as transformers called it before."""
        return self.num_slots

    def select_rows(self, rows: Tensor) -> None:
        """Keep these rows (G',) in this order; a row may come several times."""
        self.keys, self.values = self.keys[rows], self.values[rows]


class SlotCache(Cache):
    """The cache of all layers of a language model with full attention in every one."""

    def __init__(self, num_layers: int, num_slots: int) -> None:
        super().__init__(layers=[SlotLayer(num_slots) for _ in range(num_layers)])

    def fix(self) -> Tensor:
        """From now on every layer writes at the slot that stands in the tensor (1,) that is returned."""
        slot = torch.tensor([self.layers[0].taken], device=self.layers[0].keys.device)
        for layer in self.layers:
            layer.slot = slot
        return slot

    def select_rows(self, rows: Tensor) -> None:
        """Keep these rows (G',) in this order; a row may come several times."""
        for layer in self.layers:
            layer.select_rows(rows)

    def add_rows(self, other: "SlotCache", num_rows: int) -> None:
        """Put behind the rows as many copies of another cache's one row, its last slot where the last one here is.

        Raises:
            UserError: the other one has more slots taken.
        """
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            start = mine.taken - theirs.taken
            if start < 0:
                raise UserError(f"{theirs.taken} steps of another cache do not fit behind {mine.taken}")
            for name in ("keys", "values"):
                old, new = getattr(mine, name), getattr(theirs, name)
                rows = old.new_zeros(num_rows, *old.shape[1:])
                rows[:, :, start : mine.taken] = new[:, :, : theirs.taken]
                setattr(mine, name, torch.cat([old, rows]))

    def write_row(self, row: int, other: "SlotCache") -> None:
        """Write another cache's one row over the last slots of a row here."""
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            start = mine.taken - theirs.taken
            mine.keys[row, :, start : mine.taken] = theirs.keys[0, :, : theirs.taken]
            mine.values[row, :, start : mine.taken] = theirs.values[0, :, : theirs.taken]
