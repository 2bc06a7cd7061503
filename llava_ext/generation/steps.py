"""The language model one step at a time, for a batch of rows over one cache.

G rows, T steps of a prompt, D width of the language model.
"""

import torch
from torch import Tensor

from evotok_plugin.errors import UserError
from llava_ext.configuration_evotok_llava import max_positions_of
from llava_ext.generation.cache import SlotCache


class Steps:
    """What a batch of rows has seen, and the hidden state from which each goes on.

    Attributes:
        hidden: (G, D), after the last step of every row.
    """

    def __init__(self, language_model, embeddings: Tensor, mask: Tensor, num_slots: int) -> None:
        """Take in prompts.

        Args:
            embeddings: (G, T, D), padded on the left.
            mask: (G, T), 1 on what is no padding.
            num_slots: steps in all that there is to be room for.
        """
        self._language_model = language_model
        self._cache = SlotCache(language_model.config.num_hidden_layers, num_slots)
        self._mask = mask.new_zeros(mask.shape[0], num_slots, dtype=torch.bool)
        self._mask[:, : mask.shape[1]] = mask.bool()
        places = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
        self.taken = 0
        self._run(embeddings, places)
        self._next_places = places[:, -1] + 1

    @property
    def num_rows(self) -> int:
        return self.hidden.shape[0]

    @property
    def num_free(self) -> int:
        """Steps that there is still room for."""
        return self._mask.shape[1] - self.taken

    def _run(self, embeddings: Tensor, places: Tensor) -> None:
        end = self.taken + embeddings.shape[1]
        outputs = self._language_model(
            inputs_embeds=embeddings,
            attention_mask=self._mask[:, :end],
            position_ids=places,
            past_key_values=self._cache,
            use_cache=True,
        )
        self.taken, self.hidden = end, outputs.last_hidden_state[:, -1]

    def step(self, embeddings: Tensor) -> None:
        """One step in every row: what stands there next, (G, D)."""
        self._mask[:, self.taken] = True
        self._run(embeddings[:, None], self._next_places[:, None])
        self._next_places = self._next_places + 1

    def fixed(self) -> "FixedSteps":
        """The same rows with steps that are all alike; this object is not to be used any longer."""
        return FixedSteps(self._language_model, self._cache, self._mask, self._next_places, self.hidden)

    def select(self, rows: list[int]) -> None:
        """Keep these rows in this order; one may come several times, and then goes several ways."""
        if rows == list(range(self.num_rows)):
            return
        index = torch.tensor(rows, device=self.hidden.device)
        self._cache.select_rows(index)
        self.hidden, self._mask = self.hidden[index], self._mask[index]
        self._next_places = self._next_places[index]

    def add_rows(self, other: "Steps", num_rows: int) -> None:
        """Put the one row of `other` behind the rows, so many times, as if it had just come to where these are."""
        self._cache.add_rows(other._cache, num_rows)
        self._mask = torch.cat([self._mask, self._moved_mask(other).expand(num_rows, -1)])
        self.hidden = torch.cat([self.hidden, other.hidden.expand(num_rows, -1)])
        self._next_places = torch.cat([self._next_places, other._next_places.expand(num_rows)])

    def restart_row(self, row: int, other: "Steps") -> None:
        """Let a row forget what it saw and go on from the one row of `other`."""
        self._cache.write_row(row, other._cache)
        self._mask[row] = self._moved_mask(other)
        self.hidden[row] = other.hidden[0]
        self._next_places[row] = other._next_places[0]

    def _moved_mask(self, other: "Steps") -> Tensor:
        mask = torch.zeros_like(self._mask[0])
        mask[self.taken - other.taken : self.taken] = other._mask[0, : other.taken]
        return mask


class FixedSteps:
    """Steps of which each reads and writes the same memory, so that one can be recorded and repeated.

    Attributes:
        hidden: (G, D), written over by every step.
    """

    def __init__(self, language_model, cache: SlotCache, mask: Tensor, next_places: Tensor, hidden: Tensor) -> None:
        self._language_model, self._cache, self._slot = language_model, cache, cache.fix()
        self._mask = mask[:, None, None].clone()  # (G, 1, 1, S): the models take it as it is
        self._next_places, self.hidden = next_places[:, None].clone(), hidden.clone()

    def step(self, embeddings: Tensor) -> None:
        """One step in every row: what stands there next, (G, D)."""
        self._mask.index_fill_(3, self._slot, True)
        outputs = self._language_model(
            inputs_embeds=embeddings[:, None],
            attention_mask=self._mask,
            position_ids=self._next_places,
            past_key_values=self._cache,
            use_cache=True,
        )
        self.hidden.copy_(outputs.last_hidden_state[:, -1])
        self._slot.add_(1)
        self._next_places.add_(1)

    def state(self) -> list[Tensor]:
        """All that a step changes and the next one goes on from, but keys and values: those of a step that is repeated
        are written over."""
        return [self.hidden, self._mask, self._slot, self._next_places]


def can_be_fixed(language_model) -> bool:
    """Whether all steps of a language model can be alike: full attention in every layer, computed by PyTorch's SDPA,
    rotary embeddings that do not change with the length, no experts to choose (a GPU waits for the CPU there)."""
    config = language_model.config
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    experts = any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    if rope in ("dynamic", "longrope") or experts:
        return False
    sliding = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if sliding else "full_attention"]
    return set(kinds) == {"full_attention"} and config._attn_implementation == "sdpa"


def check_room(config, num_steps: int) -> None:
    """Raises:
    UserError: the language model cannot look at so many steps.
    """
    limit = max_positions_of(config)
    if limit is not None and num_steps > limit:
        raise UserError(
            f"prompt and answer take {num_steps} steps, but the language model sees {limit}; shorten the prompt or the "
            "conversation"
        )
