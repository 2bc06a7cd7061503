"""A causal LM of type qwen2 or llama as a GGUF file, the format of llama.cpp."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from evotok_plugin.errors import UserError
from llava_ext.export.gguf_vocabulary import GgufVocabulary

MODEL_TYPES = ("qwen2", "llama")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

_OUTSIDE_LAYERS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_IN_LAYERS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


def check_backbone(config: PreTrainedConfig) -> None:
    """Check that llama.cpp computes what this backbone computes.

    Raises:
        UserError: another type of model, or a setting that llama.cpp does not have for this type.
    """
    kind = config.model_type
    if kind not in MODEL_TYPES:
        raise UserError(
            f"--format gguf supports backbones of type {' and '.join(MODEL_TYPES)}, got {kind}; --format causal-lm "
            "writes others for transformers and other servers"
        )
    rope = config.rope_parameters["rope_type"]
    supported = ("default", "llama3") if kind == "llama" else ("default",)
    unsupported = {
        f"rope_type {rope!r} (expected {' or '.join(supported)})": rope not in supported,
        f"hidden_act {config.hidden_act!r} (expected 'silu')": config.hidden_act != "silu",
        "sliding windows": getattr(config, "use_sliding_window", False),
        f"head_dim {_head_dim(config)} (expected hidden_size / num_attention_heads)": kind == "qwen2"
        and _head_dim(config) * config.num_attention_heads != config.hidden_size,
    }
    if found := [name for name, is_used in unsupported.items() if is_used]:
        raise UserError(f"--format gguf does not support a {kind} backbone with {', '.join(found)}")


def write_gguf(
    path: Path,
    causal: PreTrainedModel,
    vocabulary: GgufVocabulary,
    tokenizer: Any,
    ends: Sequence[int],
    dtype: torch.dtype,
) -> None:
    """Write a causal LM, whose backbone has passed `check_backbone`, with its vocabulary.

    Vectors are float32 in any case, as llama.cpp requires. One weight at a time is converted.

    Args:
        tokenizer: names the control tokens and has the chat template.
        ends: ids of the tokens that end an answer; the file has places for three.
        dtype: of the matrices, one of `DTYPES`.
    """
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType

    types = {
        torch.float32: (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
        torch.float16: (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
        torch.bfloat16: (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    }
    writer = GGUFWriter(path, causal.config.model_type)
    writer.add_file_type(types[dtype][1])
    _add_settings(writer, causal.config)
    _add_vocabulary(writer, vocabulary, tokenizer, ends)
    weights = {_name_of(name): value for name, value in causal.state_dict().items()}
    if causal.config.rope_parameters["rope_type"] != "default":
        weights["rope_freqs.weight"] = _rope_factors(causal)
    dtypes = {name: dtype if value.ndim > 1 else torch.float32 for name, value in weights.items()}
    for name, value in weights.items():
        stored = value.new_empty(0, dtype=dtypes[name])
        size = value.numel() * stored.element_size()
        writer.add_tensor_info(name, value.shape, _as_array(stored).dtype, size, raw_dtype=types[dtypes[name]][0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, value in weights.items():
        writer.write_tensor_data(_as_array(_rearranged(name, value, causal.config).to(dtypes[name])))
    writer.close()


# Settings ----------------------------------------------------------------------------------------------------


def _head_dim(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _add_settings(writer: Any, config: PreTrainedConfig) -> None:
    writer.add_name("EvoTok causal LM")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        add(_head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])


def _add_vocabulary(writer: Any, vocabulary: GgufVocabulary, tokenizer: Any, ends: Sequence[int]) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.rule)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    writer.add_token_merges(vocabulary.merges)
    places = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    for add, token_id in zip(places, ends, strict=False):
        add(token_id)
    # Without an id llama.cpp uses token 11, whatever it is. The token is only inserted by chat templates.
    writer.add_bos_token_id(ends[0] if tokenizer.bos_token_id is None else tokenizer.bos_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


# Weights -----------------------------------------------------------------------------------------------------


def _name_of(name: str) -> str:
    """The name in a GGUF file of a parameter of a qwen2 or llama causal LM."""
    module, _, kind = name.rpartition(".")
    if module in _OUTSIDE_LAYERS:
        return f"{_OUTSIDE_LAYERS[module]}.{kind}"
    if (match := _LAYER.fullmatch(module)) and match[2] in _IN_LAYERS:
        return f"blk.{match[1]}.{_IN_LAYERS[match[2]]}.{kind}"
    raise UserError(f"--format gguf has no name for the weights {name}, which a qwen2 or llama model does not have")


def _rearranged(name: str, weight: Tensor, config: PreTrainedConfig) -> Tensor:
    """A weight with the order of rows that llama.cpp expects.

    Rotary embeddings rotate pairs of dimensions: i and i + head_dim / 2 in transformers, also in llama.cpp's qwen2, but
    2i and 2i + 1 in its llama.
    """
    part = name.split(".")[-2]
    if config.model_type != "llama" or part not in ("attn_q", "attn_k"):
        return weight
    heads = config.num_attention_heads if part == "attn_q" else config.num_key_value_heads
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


def _rope_factors(causal: PreTrainedModel) -> Tensor:
    """Divisors (head_dim / 2,) of the default frequencies of rotary embeddings."""
    config, size = causal.config, _head_dim(causal.config)
    exponents = torch.arange(0, size, 2, dtype=torch.float32) / size
    default = config.rope_parameters["rope_theta"] ** -exponents
    return default / causal.base_model.get_submodule("rotary_emb").get_buffer("inv_freq").float().cpu()


def _as_array(weight: Tensor) -> Any:
    """A NumPy array with the bytes of a tensor; NumPy lacks bfloat16."""
    weight = weight.detach().cpu().contiguous()
    return (weight.view(torch.int16) if weight.dtype == torch.bfloat16 else weight).numpy()
