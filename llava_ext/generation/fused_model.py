"""Language models whose steps of a few tokens skip what transformers prepares for every call.

A step of a small model spends most of its time outside its layers: in the attention mask, in rotary embeddings, and in
the wrappers of transformers' calls. `FusedModel` computes mask and embeddings once for all layers, and runs them one
after the other.

G rows, t tokens of each, D width, d width of a head, S slots of the cache.
"""

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model

from llava_ext.generation.cache import SlotCache, SlotLayer
from llava_ext.generation.fused_layers import (
    MAX_STEPS,
    NORMS,
    FusedLayer,
    StepInputs,
    can_compute,
    hooks_of,
    negated_half,
    rms_normed,
)

_FIXED_ROPE = ("default", "linear", "llama3", "yarn")  # the same embeddings for every length
_FIRST_POSITIONS = 512


class FusedModel(nn.Module):
    """A mixin of transformers' `LlamaModel` and `Qwen2Model` whose layers are all fused; equal to them up to rounding.

    Every call that is not a step of at most `MAX_STEPS` tokens over a growing cache runs as in transformers.
    """

    _fused_layers: list[FusedLayer]
    _hooks: list[dict[int, Any]]  # of all modules that a step does not call
    _rotary: tuple[Tensor, Tensor] | None  # cosines and sines (P, d) of the first positions

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        if past_key_values is not None and self._is_plain(past_key_values, use_cache, kwargs):
            hidden = inputs_embeds
            if hidden is None and input_ids is not None and input_ids.shape[1] <= MAX_STEPS:
                hidden = cast(Any, self.embed_tokens)(input_ids)
            taken = past_key_values.get_seq_length()
            if hidden is not None and self._can_step(hidden, attention_mask, taken):
                return self._step(hidden, attention_mask, position_ids, past_key_values, taken)
        return super().forward(  # of transformers' class, which follows this one
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )

    def _is_plain(self, cache: Cache, use_cache: bool | None, settings: dict[str, Any]) -> bool:
        """Whether a call extends a growing cache and asks for the last hidden states only."""
        config = cast(Any, self.config)
        return (
            (config.use_cache if use_cache is None else use_cache)
            and all(value is None or value is False or name == "return_dict" for name, value in settings.items())
            and settings.get("return_dict") is not False
            and not config.output_hidden_states
            and not config.output_attentions
            and config.return_dict
            and _grows(cache)
        )

    def _can_step(self, hidden: Tensor, mask: Tensor | None, taken: int) -> bool:
        return (
            hidden.ndim == 3
            and (mask is None or (isinstance(mask, Tensor) and mask.shape == (len(hidden), taken + hidden.shape[1])))
            and can_compute(hidden)
            and not self.training
            and not any(layer.training for layer in self._fused_layers)
            and not any(self._hooks)
        )

    def _step(
        self, hidden: Tensor, mask: Tensor | None, position_ids: Tensor | None, cache: Cache, taken: int
    ) -> BaseModelOutputWithPast:
        num_steps = hidden.shape[1]
        if position_ids is None:
            position_ids = torch.arange(taken, taken + num_steps, device=hidden.device)[None]
        cos, sin = self._rotary_embeddings(hidden, position_ids)
        added = _added_mask(mask, num_steps, taken, self._fused_layers[0].group)
        inputs = StepInputs(cos, sin, added, cache)
        x = hidden
        for layer in self._fused_layers:
            x = layer.step(x, inputs)
        x = rms_normed(cast(nn.Module, self.norm), x.view(-1, x.shape[-1])).view(x.shape)
        return BaseModelOutputWithPast(last_hidden_state=cast(torch.FloatTensor, x), past_key_values=cache)

    def _rotary_embeddings(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (G or 1, t, d) of the positions (G or 1, t), as `StepInputs` has them."""
        rotary = cast(Any, self.rotary_emb)
        if getattr(rotary, "rope_type", None) not in _FIXED_ROPE:
            cos, sin = rotary(hidden, position_ids)
            return cos, negated_half(sin)
        needed = int(position_ids.max()) + 1
        if self._rotary is None or needed > len(self._rotary[0]):
            positions = torch.arange(max(_FIRST_POSITIONS, 2 * needed), device=hidden.device)
            cos, sin = rotary(hidden, positions[None])
            self.__dict__["_rotary"] = (cos[0], negated_half(sin[0]))
        assert self._rotary is not None
        return self._rotary[0][position_ids], self._rotary[1][position_ids]


def _grows(cache: Cache) -> bool:
    """Whether every layer of a cache appends new keys and values and returns all of them."""
    if type(cache) is SlotCache:
        return all(cast(SlotLayer, layer).slot is None for layer in cache.layers)
    return type(cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in cache.layers)


def _added_mask(mask: Tensor | None, num_steps: int, taken: int, group: int) -> Tensor | None:
    """Make the mask of a step of t tokens from that of the slots (G, S), as `StepInputs` has it.

    Forbidden slots get a finite number: a row of which all slots are forbidden must not become NaN.
    """
    if mask is not None and bool(mask.all()):
        mask = None
    if mask is None and num_steps == 1:
        return None
    size = taken + num_steps
    causal = torch.ones(num_steps, size, dtype=torch.bool, device="cpu").tril(taken)
    allowed = causal[None] if mask is None else causal & mask[:, None].bool()  # (G or 1, t, S)
    added = torch.zeros_like(allowed, dtype=torch.float32)
    added.masked_fill_(~allowed, torch.finfo(torch.float32).min / 2)
    return added[:, None].repeat(1, 1, group, 1)


class _FusedLlamaModel(FusedModel, LlamaModel):
    pass


class _FusedQwen2Model(FusedModel, Qwen2Model):
    pass


_FUSED: dict[type[nn.Module], type[FusedModel]] = {LlamaModel: _FusedLlamaModel, Qwen2Model: _FusedQwen2Model}


def can_fuse_model(model: nn.Module, layers: nn.Module | None) -> bool:
    """Whether `fused_model` applies: a plain Llama or Qwen2 model whose layers, in the view, are all fused."""
    return (
        type(model) in _FUSED
        and "forward" not in vars(model)
        and isinstance(layers, nn.ModuleList)
        and 0 < len(layers) == cast(Any, model).config.num_hidden_layers
        and all(isinstance(layer, FusedLayer) for layer in layers)
        and type(model.norm) in NORMS
        and "forward" not in vars(model.norm)
        and "forward" not in vars(model.rotary_emb)
    )


def fused_model(model: nn.Module, original: nn.Module) -> nn.Module:
    """Make a fused model over the same parameters; neither argument is changed.

    Args:
        model: a copy of `original` with fused layers.
        original: as accepted by `can_fuse_model`.
    """
    made = copy.copy(model)
    made.__class__ = _FUSED[type(original)]
    layers = [cast(FusedLayer, layer) for layer in cast(nn.ModuleList, made.layers)]
    hooks = [one for layer in layers for one in layer.hooks]
    made.__dict__ |= {
        "_fused_layers": layers,
        "_hooks": hooks + hooks_of([cast(nn.Module, made.norm), cast(nn.Module, made.rotary_emb)]),
        "_rotary": None,
    }
    return made
