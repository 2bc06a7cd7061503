"""The language model one step at a time, for a batch of rows over one cache.

G rows, T steps of a prompt, D width of the language model, S slots of the cache.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from evotok_plugin.errors import UserError
from llava_ext.configuration_evotok_llava import max_positions_of
from llava_ext.generation.cache import SlotCache, runs_of_same
from llava_ext.packed_attention import SDPA


class Steps:
    """The state of a batch of rows: the cache, and the last hidden state of each row.

    Attributes:
        hidden: (G, D), after the last step of every row.
    """

    _language_model: PreTrainedModel
    _cache: SlotCache
    _mask: Tensor  # (G, S)
    _next_position_ids: Tensor  # (G,)

    def __init__(self, language_model: PreTrainedModel, embeddings: Tensor, mask: Tensor, num_slots: int) -> None:
        """Run the prompts through the language model.

        Args:
            embeddings: (G, T, D), padded on the left.
            mask: (G, T), 0 on padding.
            num_slots: capacity in steps, those of the prompts included.
        """
        self._language_model = language_model
        self._cache = SlotCache(language_model.config.num_hidden_layers, num_slots)
        self._mask = mask.new_zeros(mask.shape[0], num_slots, dtype=torch.bool)
        self._mask[:, : mask.shape[1]] = mask.bool()
        position_ids = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
        self.taken = 0
        self._run(embeddings, position_ids)
        self._next_position_ids = position_ids[:, -1] + 1

    @classmethod
    def joined(cls, parts: "Sequence[Steps]", num_free: int) -> "Steps":
        """Join single rows without padding (`split`), which stay as they are; a part can be repeated.

        Args:
            num_free: number of steps that will follow.
        """
        made, first = cls.__new__(cls), parts[0]
        made._language_model, made.taken = first._language_model, max(part.taken for part in parts)
        made._cache = SlotCache.joined([part._cache for part in parts], made.taken, num_free)
        made._mask = first._mask.new_zeros(len(parts), made.taken + num_free)
        for rows, part in runs_of_same(parts):
            made._mask[rows, made.taken - part.taken : made.taken] = True
        made.hidden = torch.cat([part.hidden for part in parts])
        made._next_position_ids = torch.cat([part._next_position_ids for part in parts])
        return made

    def split(self) -> "list[Steps]":
        """Copy every row to steps of its own, without padding and without room for further steps."""
        lengths = self._mask[:, : self.taken].sum(dim=1).tolist()
        rows: list[Steps] = []
        for row, cache in enumerate(self._cache.split(lengths)):
            made = Steps.__new__(Steps)
            made._language_model, made._cache, made.taken = self._language_model, cache, lengths[row]
            made._mask = self._mask.new_ones(1, lengths[row])
            made.hidden = self.hidden[row : row + 1].clone()
            made._next_position_ids = self._next_position_ids[row : row + 1].clone()
            rows.append(made)
        return rows

    @property
    def num_bytes(self) -> int:
        """The memory of keys and values."""
        return self._cache.num_bytes

    @property
    def num_rows(self) -> int:
        return self.hidden.shape[0]

    @property
    def num_free(self) -> int:
        """Number of steps that still fit into the cache."""
        return self._mask.shape[1] - self.taken

    def _run(self, embeddings: Tensor, position_ids: Tensor) -> Tensor:
        end = self.taken + embeddings.shape[1]
        outputs = self._language_model(
            inputs_embeds=embeddings,
            attention_mask=self._mask[:, :end],
            position_ids=position_ids,
            past_key_values=self._cache,
            use_cache=True,
        )
        states: Tensor = outputs.last_hidden_state
        self.taken, self.hidden = end, states[:, -1]
        return states

    def step(self, embeddings: Tensor) -> None:
        """Advance every row by one step with the embeddings (G, D)."""
        self.run(embeddings[:, None])

    def run(self, embeddings: Tensor) -> Tensor:
        """Advance every row by t steps with the embeddings (G, t, D), all computed at once.

        Returns:
            the hidden states of these steps, (G, t, D).
        """
        count = embeddings.shape[1]
        self._mask[:, self.taken : self.taken + count] = True
        offsets = torch.arange(count, device=embeddings.device)
        states = self._run(embeddings, self._next_position_ids[:, None] + offsets)
        self._next_position_ids = self._next_position_ids + count
        return states

    def drop_last(self, count: int, hidden: Tensor) -> None:
        """Undo the last `count` steps, so that other steps can follow the ones before them.

        Args:
            hidden: (G, D), of the last remaining step.
        """
        self._cache.drop_last(count)
        self.taken -= count
        self._mask[:, self.taken : self.taken + count] = False
        self._next_position_ids, self.hidden = self._next_position_ids - count, hidden

    def to_fixed(self) -> "FixedSteps":
        """Convert to steps that all use the same memory; do not use this object afterwards."""
        return FixedSteps(self._language_model, self._cache, self._mask, self._next_position_ids, self.hidden)

    def select(self, rows: list[int]) -> None:
        """Keep the rows in this order; a repeated row continues as several independent ones."""
        if rows == list(range(self.num_rows)):
            return
        index = torch.tensor(rows, device=self.hidden.device)
        self._cache.select_rows(index)
        self.hidden, self._mask = self.hidden[index], self._mask[index]
        self._next_position_ids = self._next_position_ids[index]

    @property
    def longest(self) -> int:
        """The number of filled slots that the longest row uses, with those after its first."""
        used = self._mask[:, : self.taken].any(dim=0)
        return self.taken - int(used.int().argmax())

    def resize(self, taken: int, num_free: int) -> None:
        """Make room: `taken` filled slots, of which rows use the last ones, and `num_free` free slots.

        Raises:
            ValueError: a row uses more slots than `taken`.
        """
        if taken < self.longest:
            raise ValueError(f"a row uses {self.longest} slots, more than {taken}")
        self._cache.resize(taken, num_free)
        mask = self._mask.new_zeros(self.num_rows, taken + num_free)
        kept = min(self.taken, taken)
        mask[:, taken - kept : taken] = self._mask[:, self.taken - kept : self.taken]
        self._mask, self.taken = mask, taken

    def add_rows(self, other: "Steps") -> None:
        """Append the rows of `other`, aligned to the last step of the rows here; makes room if they are longer."""
        if other.taken > self.taken:
            self.resize(other.taken, self.num_free)
        self._cache.add_rows(other._cache)
        self._mask = torch.cat([self._mask, self._shifted_mask(other)])
        self.hidden = torch.cat([self.hidden, other.hidden])
        self._next_position_ids = torch.cat([self._next_position_ids, other._next_position_ids])

    def _shifted_mask(self, other: "Steps") -> Tensor:
        """Align the masks (rows, S) of `other` to the last step of the rows here."""
        mask = self._mask.new_zeros(other.num_rows, self._mask.shape[1])
        mask[:, self.taken - other.taken : self.taken] = other._mask[:, : other.taken]
        return mask


class FixedSteps:
    """Steps that each read and write the same memory, so that one can be recorded and replayed.

    Attributes:
        hidden: (G, D), overwritten by every step.
    """

    def __init__(
        self,
        language_model: PreTrainedModel,
        cache: SlotCache,
        mask: Tensor,
        next_position_ids: Tensor,
        hidden: Tensor,
    ) -> None:
        self._language_model, self._cache, self._slot = language_model, cache, cache.fix()
        self._mask = mask[:, None, None].clone()  # (G, 1, 1, S): a shape that the models use unchanged
        self._next_position_ids, self.hidden = next_position_ids[:, None].clone(), hidden.clone()

    def step(self, embeddings: Tensor) -> None:
        """Advance every row by one step with the embeddings (G, D)."""
        self._mask.index_fill_(3, self._slot, True)
        outputs = self._language_model(
            inputs_embeds=embeddings[:, None],
            attention_mask=self._mask,
            position_ids=self._next_position_ids,
            past_key_values=self._cache,
            use_cache=True,
        )
        self.hidden.copy_(outputs.last_hidden_state[:, -1])
        self._slot.add_(1)
        self._next_position_ids.add_(1)

    def state(self) -> list[Tensor]:
        """Return the tensors that a step changes, except keys and values: a repeated step overwrites its own."""
        return [self.hidden, self._mask, self._slot, self._next_position_ids]


def has_fixed_rotation(config: PreTrainedConfig) -> bool:
    """Whether the rotary embedding of a position does not depend on the number of positions."""
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    return rope not in ("dynamic", "longrope")


def can_use_fixed_steps(language_model: PreTrainedModel) -> bool:
    """Whether all steps of a language model can use the same memory.

    This needs full attention in every layer, computed by PyTorch's SDPA, rotary embeddings that do not change with the
    length, and no mixture of experts (there the GPU waits for the CPU).
    """
    config = language_model.config
    experts = any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    if not has_fixed_rotation(config) or experts:
        return False
    sliding = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if sliding else "full_attention"]
    return set(kinds) == {"full_attention"} and config._attn_implementation in SDPA


def check_room(config: PreTrainedConfig, num_steps: int) -> None:
    """Check that the language model has positions for a number of steps.

    Raises:
        UserError: it has fewer.
    """
    limit = max_positions_of(config)
    if limit is not None and num_steps > limit:
        raise UserError(
            f"prompt and answer take {num_steps} steps, but the language model has {limit} positions; shorten the "
            "prompt or the conversation"
        )
