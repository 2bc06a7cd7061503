"""The loop of transformers' `generate` for greedy and sampled text, over a fused language model.

transformers prepares inputs, wraps outputs and checks arguments in every step, which for a small model takes as long as
the step itself. Here a step runs the language model and the output layer directly. Prompts run as in transformers, and
so does every call that asks for more than the ids.

B rows, T tokens, D width of the language model.
"""

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.generation import BaseStreamer, LogitsProcessor, LogitsProcessorList, StoppingCriteriaList

from evotok_plugin.errors import UserError
from llava_ext.generation.cache import SlotCache
from llava_ext.generation.fused_model import FusedModel
from llava_ext.generation.model_interface import ModelInterface

_INPUTS = {"attention_mask", "position_ids", "past_key_values", "use_cache", "pixel_values", "image_codes"}
_INPUTS |= {"logits_to_keep", "tokenizer", "assistant_tokenizer"}
_FIRST_SLOTS = 64  # of the cache, after the prompt


class SuppressTokens(LogitsProcessor):
    """transformers' `SuppressTokensLogitsProcessor`, which searches all ids in every step, with a mask that is kept.

    Args:
        ids: the tokens that are not written, (n,).
        in_place: overwrite the scores.
    """

    def __init__(self, ids: Tensor, in_place: bool) -> None:
        self._ids, self._in_place = ids, in_place
        self._mask = torch.zeros(0, dtype=torch.bool)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._mask.shape[0] != scores.shape[-1] or self._mask.device != scores.device:
            ids = torch.arange(scores.shape[-1], device=scores.device)
            self._mask = torch.isin(ids, self._ids.to(scores.device))
        return (scores.masked_fill_ if self._in_place else scores.masked_fill)(self._mask, -torch.inf)


def can_write_text(
    model: ModelInterface, config: GenerationConfig, synced_gpus: bool, inputs: Mapping[str, Any]
) -> bool:
    """Whether `write_text` does all that a call of transformers' `_sample` asks for."""
    cache = inputs.get("past_key_values")
    assert isinstance(model, nn.Module)  # the type of the generation mixins does not say so
    return (
        isinstance(model.language_model, FusedModel)
        and not (model._forward_hooks or model._forward_pre_hooks or "forward" in vars(model))
        and not synced_gpus
        and not config.return_dict_in_generate
        and config.prefill_chunk_size is None
        and not getattr(config, "is_assistant", False)
        and bool(inputs.get("use_cache"))
        and type(cache) is DynamicCache
        and all(type(layer) is DynamicLayer for layer in cache.layers)
        and not getattr(cache, "_is_user_defined", False)  # a cache of the caller must be filled
        and cache.get_seq_length() == 0
        and set(inputs) <= _INPUTS
    )


def write_text(
    model: ModelInterface,
    input_ids: Tensor,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    streamer: BaseStreamer | None,
    inputs: dict[str, Any],
) -> Tensor:
    """Continue prompts (B, T), as transformers' `_sample` does, with the same random numbers.

    Args:
        inputs: the arguments of the model's forward, as `can_write_text` accepts them.

    Returns:
        the ids of prompts and answers, (B, T').

    Raises:
        UserError: a logits processor of the caller has chosen a residual token.
    """
    whole: Any = model  # mypy does not know it as a module
    prepared = whole.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **inputs)
    outputs = whole(**prepared, return_dict=True)
    cache = SlotCache.take_over(outputs.past_key_values, _FIRST_SLOTS)
    mask, logits = prepared.get("attention_mask"), outputs.logits[:, -1].to(torch.float32, copy=True)
    del outputs  # with the logits of the prompt
    position_ids = prepared.get("position_ids")
    if position_ids is None:
        steps = torch.ones_like(input_ids) if mask is None else mask
        position_ids = steps.long().cumsum(dim=-1) - 1
    position_ids = position_ids[:, -1:]
    if mask is not None and bool(mask.all()):
        mask = None
    process = cast(Callable[[Tensor, Tensor], Tensor], processors)
    has_ends = any(hasattr(one, "eos_token_id") for one in criteria)
    unfinished = torch.ones(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
    pad = cast(Tensor, config._pad_token_tensor)  # there is one if there are ends
    while True:
        scores: Tensor = process(input_ids, logits.float())
        if config.do_sample:
            chosen = torch.multinomial(scores.softmax(dim=-1), num_samples=1)
        else:
            chosen = scores.argmax(dim=-1, keepdim=True)
        if has_ends:
            chosen = torch.where(unfinished[:, None], chosen, pad)
        input_ids = torch.cat([input_ids, chosen], dim=1)
        if streamer is not None:
            streamer.put(chosen[:, 0].cpu())
        unfinished = unfinished & ~criteria(input_ids, None)
        if not unfinished.any():
            break
        _check(model, chosen)
        position_ids = position_ids + 1
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        cache.make_room()
        states = model.language_model(
            inputs_embeds=model.embed_ids(chosen),
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        logits = model.text_logits(states.last_hidden_state, 1)[:, -1]
    if streamer is not None:
        streamer.end()
    return input_ids


def _check(model: ModelInterface, ids: Tensor) -> None:
    first, end = model.vocabulary.offset, model.vocabulary.offset + model.vocabulary.size
    if any(first <= one < end for one in ids.flatten().tolist()):
        raise UserError(
            "a logits processor has chosen a residual token, which text does not have; draw with modalities='auto'"
        )
