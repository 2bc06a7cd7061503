"""Settings of answers that may contain images, in order of precedence: the call's keywords, its `GenerationConfig`, the
model's.

They have transformers' names; a setting that is not supported is an error. T tokens, V rows of the output layer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.generation import LogitsProcessorList

from evotok_plugin.common.foreign_files import describe_error
from evotok_plugin.errors import UserError
from evotok_plugin.sampling import SamplingOptions
from llava_ext.generation.model_interface import ModelInterface
from llava_ext.generation.options import IMAGE_GENERATION
from llava_ext.generation.selection_options import IMAGE_SELECTION

GREEDY = SamplingOptions(temperature=0)
MAX_NEW_TOKENS = 256  # the default if no setting is given
_SAMPLING = ("temperature", "top_k", "top_p", "min_p")
_HONORED = {"max_new_tokens", "max_length", "do_sample", *_SAMPLING, "eos_token_id", "pad_token_id", IMAGE_GENERATION}
# Applied by transformers' own logits processors.
_PROCESSORS = {
    "sequence_bias", "repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "min_length", "min_new_tokens",
    "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens", "remove_invalid_values",
    "renormalize_logits",
}  # fmt: skip
# These do not affect which tokens are chosen here: cache layout, candidates of assisted decoding, metadata, and the
# selection among the candidates of `generate_images`.
_WITHOUT_EFFECT = {
    "use_cache", "cache_implementation", "cache_config", "max_cache_len", "compile_config", "disable_compile",
    "prefill_chunk_size", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind", "max_matching_ngram_size",
    "early_stopping", "length_penalty", "low_memory", "bos_token_id", "decoder_start_token_id", "transformers_version",
    "continuous_batching_config", IMAGE_SELECTION,
}  # fmt: skip


@dataclass(frozen=True)
class TextSettings:
    """Settings for sampling the text of an answer.

    Attributes:
        max_new_tokens: None if it is not set.
        max_length: length of prompt and answer together, used if `max_new_tokens` is not set.
        sampling: greedy unless `do_sample` is set.
        ends: ids that end an answer.
        pad_token_id: as set by the call; None means the processor's.
        config: the settings of transformers' logits processors.
    """

    max_new_tokens: int | None
    max_length: int | None
    sampling: SamplingOptions
    ends: frozenset[int]
    pad_token_id: int | None
    config: GenerationConfig

    def processors(self, model: ModelInterface, prompt_length: int) -> LogitsProcessorList:
        """Create transformers' logits processors for a prompt of that many tokens; usually an empty list.

        Raises:
            UserError: transformers rejects a setting.
        """
        try:
            # The model's own method would suppress the image tokens as well.
            return GenerationMixin._get_logits_processor(
                model,  # type: ignore[arg-type]  # transformers annotates `self` as PreTrainedModel
                self.config,
                input_ids_seq_length=prompt_length,
                device=model.device,  # type: ignore[arg-type]  # annotated as str, used as a device
            )
        except (ValueError, TypeError, IndexError) as error:
            raise UserError(f"invalid generation setting of the call or the model: {describe_error(error)}") from error


def text_settings(
    model: ModelInterface, config: GenerationConfig | None = None, given: Mapping[str, Any] | None = None
) -> TextSettings:
    """Resolve the settings of text.

    Args:
        config: the call's `GenerationConfig`.
        given: the call's keywords by the names of `GenerationConfig`; None counts as not given.

    Raises:
        UserError: a setting is not supported for answers with images.
    """
    given = {name: value for name, value in (given or {}).items() if value is not None}
    unknown = sorted(set(given) - _HONORED - _PROCESSORS)
    if unknown:
        raise UserError(
            f"generate with images does not take {', '.join(unknown)}; settings of the images go into "
            "drawing=DrawingOptions(...)"
        )
    of_config = _set_in(config, "generation_config")
    of_model = _set_in(model.generation_config, "model.generation_config")
    merged: dict[str, Any] = {}
    for layer in (of_model, of_config, given):
        if "max_new_tokens" in layer or "max_length" in layer:  # either one replaces both of the layers below
            merged = {name: value for name, value in merged.items() if name not in ("max_new_tokens", "max_length")}
        merged |= layer
    sampling = SamplingOptions(**{name: merged[name] for name in _SAMPLING if name in merged})
    ends = merged.get("eos_token_id")
    return TextSettings(
        merged.get("max_new_tokens"),
        merged.get("max_length"),
        sampling if merged.get("do_sample") else GREEDY,
        frozenset([] if ends is None else torch.as_tensor(ends).flatten().tolist()),
        {**of_config, **given}.get("pad_token_id"),
        _processor_config(model, merged),
    )


def _set_in(config: GenerationConfig | None, name: str) -> dict[str, Any]:
    """Collect the values that a generation config sets.

    Raises:
        UserError: a setting has an effect in transformers but is not supported here.
    """
    if config is None:
        return {}
    defaults = GenerationConfig._get_default_generation_params()
    values = {
        key: value
        for key, value in vars(config).items()
        if value is not None and value is not False and not key.startswith("_") and key not in _WITHOUT_EFFECT
    }
    for key, value in values.items():
        if key not in _HONORED | _PROCESSORS and value != defaults.get(key):
            raise UserError(
                f"{name}.{key} = {value!r} has no effect on answers with images; unset it, or generate only text "
                '(modalities="text")'
            )
    honored = {key: value for key, value in values.items() if key in _HONORED | _PROCESSORS}
    if config.do_sample is False:
        honored["do_sample"] = False
    return honored


def _processor_config(model: ModelInterface, merged: Mapping[str, Any]) -> GenerationConfig:
    config = GenerationConfig(**{name: merged[name] for name in _PROCESSORS if name in merged})
    config.eos_token_id = merged.get("eos_token_id")
    config.update(**config._get_default_generation_params(), defaults_only=True)
    model._prepare_special_tokens(  # type: ignore[misc]  # transformers annotates `self` as PreTrainedModel
        config, device=model.device
    )
    return config


def process_logits(processors: LogitsProcessorList, ids: Tensor, logits: Tensor) -> Tensor:
    """Apply logits processors to the logits (1, V) that follow ids (T,), without the ids that have no row in V."""
    if not len(processors):
        return logits
    return processors(ids[ids < logits.shape[-1]][None], logits)  # type: ignore[arg-type]  # annotated as LongTensor
