"""Decoder layers that take single steps in fewer operations, for generation on a CPU.

A step of a few rows spends much of its time between the matrix products of a layer: in separate projections, in the
parts of a norm, and in repeating keys and values for grouped queries. `FusedLayer` computes queries, keys and values as
one product, likewise the two inputs of the MLP, and lets the queries of a group share their keys and values.

G rows, D width, H heads, K heads of keys and values, d their width, S slots of the cache.
"""

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RMSNorm

from evotok_plugin.kernels.thin_linear import MAX_ROWS, JoinedLinear


class FusedLayer(nn.Module):
    """A mixin of transformers' decoder layers; equal to them up to rounding.

    Prompts, calls with gradients or in training mode, and layers with hooks run as in transformers.
    """

    _qkv: JoinedLinear
    _gate_up: JoinedLinear

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if past_key_values is None or position_embeddings is None or not self._can_fuse(hidden_states, kwargs):
            return super().forward(  # of transformers' class, which follows this one
                hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        attention, mlp, num_rows = cast(Any, self.self_attn), cast(Any, self.mlp), hidden_states.shape[0]
        x = hidden_states[:, 0]  # (G, D)
        width, group = attention.head_dim, attention.num_key_value_groups
        heads = self._qkv(_normed(self.input_layernorm, x)).view(num_rows, -1, 1, width)  # (G, H + 2 K, 1, d)
        num_kv = heads.shape[1] // (group + 2)
        turned, value = heads[:, :-num_kv], heads[:, -num_kv:]
        turned = _rotated(turned, *position_embeddings)
        key, value = past_key_values.update(turned[:, -num_kv:], value, attention.layer_idx)  # (G, K, S, d)
        query = turned[:, :-num_kv].reshape(num_rows, num_kv, group, width)
        attended = F.scaled_dot_product_attention(query, key, value, attention_mask, scale=attention.scaling)
        x = x + attention.o_proj(attended.reshape(num_rows, -1))
        gate, up = self._gate_up(_normed(self.post_attention_layernorm, x)).chunk(2, dim=-1)
        return (x + mlp.down_proj(F.silu(gate) * up))[:, None]

    def _can_fuse(self, hidden_states: Tensor, settings: dict[str, Any]) -> bool:
        return (
            hidden_states.shape[1] == 1
            and hidden_states.shape[0] <= MAX_ROWS
            and hidden_states.dtype == torch.float32
            and not self.training
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and not settings.get("output_attentions")
            and not any(module._forward_hooks or module._forward_pre_hooks for module in _parts(self))
        )


def _parts(layer: nn.Module) -> Sequence[nn.Module]:
    attention, mlp = cast(Any, layer.self_attn), cast(Any, layer.mlp)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj)
    return (attention, mlp, *projections, cast(Any, layer).input_layernorm, cast(Any, layer).post_attention_layernorm)


def _normed(norm: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), norm.weight, norm.variance_epsilon)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary embeddings (G or 1, 1, d) to x (G, h, 1, d)."""
    half = x.shape[-1] // 2
    signed = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
    return torch.addcmul(x * cos[:, None], x.roll(half, dims=-1), signed[:, None])


class _FusedLlama(FusedLayer, LlamaDecoderLayer):
    pass


class _FusedQwen2(FusedLayer, Qwen2DecoderLayer):
    pass


_FUSED: dict[type[nn.Module], type[FusedLayer]] = {LlamaDecoderLayer: _FusedLlama, Qwen2DecoderLayer: _FusedQwen2}
_NORMS = (LlamaRMSNorm, Qwen2RMSNorm)


def can_be_fused(layer: nn.Module) -> bool:
    """Whether `fused` applies: a layer of Llama's or Qwen2's architecture on a CPU, in float32, with full attention
    computed by PyTorch's SDPA, and with plain linear layers (no adapters, not quantized)."""
    if type(layer) not in _FUSED or "forward" in vars(layer):
        return False
    attention, mlp, *others = _parts(layer)
    *projections, norm_1, norm_2 = others
    config = cast(Any, attention).config
    plain = [*projections, cast(Any, attention).o_proj, cast(Any, mlp).down_proj]
    return (
        config._attn_implementation == "sdpa"
        and config.hidden_act == "silu"
        and getattr(attention, "sliding_window", None) is None
        and type(norm_1) in _NORMS
        and type(norm_2) in _NORMS
        and not any("forward" in vars(part) for part in (attention, mlp, *others))
        and all(type(one) is nn.Linear and type(one.weight) is nn.Parameter for one in plain)
        and all(one.weight.device.type == "cpu" and one.weight.dtype == torch.float32 for one in plain)
    )


def fused(layer: nn.Module, original: nn.Module) -> nn.Module:
    """Make a fused layer over the same parameters; neither argument is changed.

    Args:
        layer: a copy of `original` whose linear layers may be `ThinLinear`.
        original: as accepted by `can_be_fused`.
    """
    made = copy.copy(layer)
    made.__class__ = _FUSED[type(original)]
    _, _, *projections = _parts(layer)
    query, key, value, gate, up = cast(Sequence[nn.Linear], projections[:5])
    made.__dict__["_qkv"], made.__dict__["_gate_up"] = JoinedLinear([query, key, value]), JoinedLinear([gate, up])
    return made
