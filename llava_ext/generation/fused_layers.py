"""Decoder layers that take single steps in fewer operations, for generation on a CPU.

A step of a few rows spends much of its time between the matrix products of a layer: in separate projections, in the
parts of a norm, and in repeating keys and values for grouped queries. `FusedLayer` computes queries, keys and values as
one product, likewise the two inputs of the MLP, and lets the queries of a group share their keys and values.

G rows, t tokens of each, D width, H heads, K heads of keys and values, group = H / K, d their width, S slots of the
cache.
"""

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RMSNorm

from evotok_plugin.kernels.thin_linear import MAX_ROWS, JoinedLinear
from llava_ext.packed_attention import SDPA

MAX_STEPS = 8  # tokens of a row in one step; longer ones are prompts, which transformers computes as well


@dataclass(frozen=True)
class StepInputs:
    """The inputs that are the same for all layers in a step of t <= `MAX_STEPS` tokens per row.

    Attributes:
        cos, sin: rotary embeddings (G or 1, t, d); the first half of `sin` is negated.
        mask: (G, 1, group t, S), added to the scores of the queries of a group; None if all slots are read.
        cache: of all layers.
    """

    cos: Tensor
    sin: Tensor
    mask: Tensor | None
    cache: Cache


def negated_half(sin: Tensor) -> Tensor:
    """Negate the first half of the sines (..., d) of rotary embeddings."""
    half = sin.shape[-1] // 2
    return torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)


class FusedLayer(nn.Module):
    """A mixin of transformers' decoder layers; equal to them up to rounding.

    Prompts, calls with gradients or in training mode, and layers with hooks run as in transformers.
    """

    _modules_of_step: "_StepModules"

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
        if (
            past_key_values is None
            or position_embeddings is None
            or hidden_states.shape[1] != 1
            or kwargs.get("output_attentions")
            or not self.can_step(hidden_states)
        ):
            return super().forward(  # of transformers' class, which follows this one
                hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        cos, sin = position_embeddings
        return self.step(hidden_states, StepInputs(cos, negated_half(sin), attention_mask, past_key_values))

    @property
    def group(self) -> int:
        """The number of heads that share keys and values."""
        return self._modules_of_step.group

    @property
    def hooks(self) -> list[dict[int, Any]]:
        """The hooks of this layer and of all modules in it that `step` does not call."""
        return self._modules_of_step.hooks

    def can_step(self, hidden_states: Tensor) -> bool:
        """Whether `step` applies to a step with the inputs (G, t, D) in the current mode."""
        return can_compute(hidden_states) and not self.training and not any(self._modules_of_step.hooks)

    def step(self, hidden_states: Tensor, inputs: StepInputs) -> Tensor:
        """Compute the layer for t <= `MAX_STEPS` tokens in each row: (G, t, D) -> (G, t, D)."""
        parts = self._modules_of_step
        num_rows, num_steps, size = hidden_states.shape
        x = hidden_states.reshape(-1, size)  # (G t, D)
        width, group, num_kv = parts.head_width, parts.group, parts.num_kv
        heads = parts.qkv(rms_normed(parts.norm_1, x)).view(num_rows, num_steps, -1, width)
        # (G, H + 2 K, t, d)
        heads = heads.view(num_rows, -1, 1, width) if num_steps == 1 else heads.transpose(1, 2)
        turned, value = heads[:, :-num_kv], heads[:, -num_kv:]
        turned = _rotated(turned, inputs.cos, inputs.sin)
        key, value = inputs.cache.update(turned[:, -num_kv:], value, parts.layer_index)  # (G, K, S, d)
        query = turned[:, :-num_kv].reshape(num_rows, num_kv, group * num_steps, width)
        attended = F.scaled_dot_product_attention(query, key, value, inputs.mask, scale=parts.scaling)
        if num_steps > 1:
            attended = attended.reshape(num_rows, -1, num_steps, width).transpose(1, 2)
        x = x + parts.output(attended.reshape(num_rows * num_steps, -1))
        gate, up = parts.gate_up(rms_normed(parts.norm_2, x)).chunk(2, dim=-1)
        return (x + parts.down(F.silu(gate).mul_(up))).view(hidden_states.shape)


@dataclass(frozen=True)
class _StepModules:
    """The modules and sizes that a step of a layer uses; looking them up in the layer takes longer.

    Attributes:
        hooks: of all modules that a step does not call.
    """

    qkv: JoinedLinear
    gate_up: JoinedLinear
    norm_1: nn.Module
    norm_2: nn.Module
    output: nn.Module
    down: nn.Module
    layer_index: int
    head_width: int
    num_kv: int
    group: int
    scaling: float
    hooks: list[dict[int, Any]]

    @classmethod
    def of(cls, layer: nn.Module) -> "_StepModules":
        attention, mlp = cast(Any, layer.self_attn), cast(Any, layer.mlp)
        parts = _parts(layer)
        query, key, value, gate, up = cast(Sequence[nn.Linear], parts[2:7])
        norm_1, norm_2 = parts[7:]
        return cls(
            JoinedLinear([query, key, value]),
            JoinedLinear([gate, up]),
            norm_1,
            norm_2,
            attention.o_proj,
            mlp.down_proj,
            attention.layer_idx,
            attention.head_dim,
            key.out_features // attention.head_dim,
            attention.num_key_value_groups,
            attention.scaling,
            hooks_of([layer, *parts]),
        )


def hooks_of(modules: Sequence[nn.Module]) -> list[dict[int, Any]]:
    """The dictionaries of the modules' hooks around their calls, which are empty as long as there are none."""
    return [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]


def can_compute(hidden_states: Tensor) -> bool:
    """Whether fused layers can compute a step with the inputs (G, t, D): a few rows in float32, without gradients."""
    num_rows, num_steps, _ = hidden_states.shape
    return (
        num_steps <= MAX_STEPS
        and num_rows * num_steps <= MAX_ROWS
        and hidden_states.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


def _parts(layer: nn.Module) -> Sequence[nn.Module]:
    attention, mlp = cast(Any, layer.self_attn), cast(Any, layer.mlp)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj)
    return (attention, mlp, *projections, cast(Any, layer).input_layernorm, cast(Any, layer).post_attention_layernorm)


def rms_normed(norm: nn.Module, x: Tensor) -> Tensor:
    """Compute transformers' RMS norm of x (R, D) in fewer operations."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    scale = torch.addcmul(_constant(cast(Any, norm).variance_epsilon), length, length, value=1 / x.shape[-1]).rsqrt_()
    return (x * cast(Tensor, norm._parameters["weight"])).mul_(scale)


@functools.cache
def _constant(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float32, device="cpu")


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary embeddings (G or 1, t, d) to x (G, h, t, d); the first half of `sin` is negated."""
    return torch.addcmul(x * cos[:, None], x.roll(x.shape[-1] // 2, dims=-1), sin[:, None])


class _FusedLlama(FusedLayer, LlamaDecoderLayer):
    pass


class _FusedQwen2(FusedLayer, Qwen2DecoderLayer):
    pass


_FUSED: dict[type[nn.Module], type[FusedLayer]] = {LlamaDecoderLayer: _FusedLlama, Qwen2DecoderLayer: _FusedQwen2}
NORMS = (LlamaRMSNorm, Qwen2RMSNorm)


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
        config._attn_implementation in SDPA
        and config.hidden_act == "silu"
        and getattr(attention, "sliding_window", None) is None
        and type(norm_1) in NORMS
        and type(norm_2) in NORMS
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
    made.__dict__["_modules_of_step"] = _StepModules.of(made)
    return made
