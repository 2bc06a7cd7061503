"""The weights of a teacher's vision transformer under the names of the tokenizer's encoder.

S special tokens, N positions, D width.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from evotok_plugin.backbone_encoder import BackboneEncoder
from evotok_plugin.configuration_evotok import EvoTokConfig
from evotok_plugin.encoder import EvoTokEncoder
from evotok_plugin.errors import UserError
from evotok_plugin.teachers.timm_towers import TimmTower
from evotok_plugin.teachers.tower import TeacherTower
from evotok_plugin.teachers.transformers_towers import TransformersTower

_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "quick_gelu": "quick_gelu"}
# Names of the parts of a layer, in the order in which they are tried.
_PARTS = (
    (r"^layernorm_before\.|^norm1\.|^layer_norm1\.", "layer_norm1."),
    (r"^layernorm_after\.|^norm2\.|^layer_norm2\.", "layer_norm2."),
    (r"^(?:attention|self_attn)\.(?=[qkv]_proj)", "self_attn."),
    (r"^(?:attention|self_attn)\.(?:o|out)_proj\.", "self_attn.out_proj."),
    (r"^mlp\.", "mlp."),
)


def required_settings(tower: TeacherTower) -> dict[str, Any]:
    """The fields of the tokenizer's configuration, by name, that an encoder needs to start from a teacher.

    Raises:
        UserError: the encoder cannot compute this network.
    """
    if not isinstance(tower, TransformersTower) or tower.kind.startswith(("dinov3", "siglip2")):
        name = tower.kind if isinstance(tower, TransformersTower) else tower.name
        raise UserError(
            f"the encoder cannot start from {name}, only from SigLIP, CLIP, ViT and DINOv2; pass --init_encoder false"
        )
    config: Any = tower.model.config
    activation = _ACTIVATIONS.get(config.hidden_act)
    if activation is None or getattr(config, "use_swiglu_ffn", False) or not getattr(config, "qkv_bias", True):
        raise UserError(
            f"the encoder cannot start from this {tower.kind}: it has the activation {config.hidden_act}, gated MLPs "
            "or no biases; pass --init_encoder false"
        )
    inner = getattr(config, "intermediate_size", None) or config.hidden_size * config.mlp_ratio
    return {
        "patch_size": config.patch_size,
        "encoder_hidden_size": config.hidden_size,
        "encoder_num_heads": config.num_attention_heads,
        "encoder_intermediate_size": int(inner),
        "encoder_activation": activation,
        "encoder_norm_eps": float(config.layer_norm_eps),
        "encoder_num_special_tokens": tower.num_special_tokens,
        "encoder_pre_norm": tower.kind.startswith("clip"),
    }


def init_encoder(encoder: EvoTokEncoder | BackboneEncoder, config: EvoTokConfig, tower: TeacherTower) -> None:
    """Copy the weights of a teacher's embeddings and first layers to the encoder, which then computes the same.

    An encoder with a CNN gets the weights of a teacher with the same CNN.

    The encoder takes pixels from -1 to 1: another normalization becomes part of the first convolution, and layer
    scales become part of the matrices in front of them.

    Raises:
        UserError: the encoder cannot compute this network, or has other sizes or fewer positions.
    """
    if isinstance(encoder, BackboneEncoder):
        _init_backbone(encoder, config, tower)
        return
    needed = required_settings(tower)
    if different := {key: value for key, value in needed.items() if getattr(config, key) != value}:
        raise UserError(
            "the encoder cannot start from the teacher, because it has other settings: "
            + ", ".join(f"{key} {getattr(config, key)}, expected {value}" for key, value in different.items())
            + "; pass --model '{"
            + ", ".join(f"{key}: {value}" for key, value in different.items())
            + "}', or --init_encoder false"
        )
    assert isinstance(tower, TransformersTower)
    if len(tower.blocks) < config.encoder_num_layers:
        raise UserError(
            f"the teacher has {len(tower.blocks)} layers, the encoder needs {config.encoder_num_layers}; lower "
            "encoder_num_layers"
        )
    state = _embeddings(tower, config)
    for index in range(config.encoder_num_layers):
        for name, value in _layer(tower.blocks[index].state_dict()).items():
            state[f"encoder.layers.{index}.{name}"] = value
    # The bottleneck keeps its random weights; the teacher has none.
    state |= {name: value for name, value in encoder.state_dict().items() if name.startswith("to_latent.")}
    encoder.load_state_dict(state)


def _init_backbone(encoder: BackboneEncoder, config: EvoTokConfig, tower: TeacherTower) -> None:
    network = encoder.backbone.network
    if not isinstance(tower, TimmTower) or tower.network_name != config.encoder_backbone:
        raise UserError(
            f"the encoder's backbone {config.encoder_backbone} starts from a teacher of the same kind, "
            f"timm:{config.encoder_backbone}[:FILE], got {tower.name}; change the teacher or encoder_backbone"
        )
    weights = tower.network.state_dict()
    network.load_state_dict({name: weights[name] for name in network.state_dict()})


def _embeddings(tower: TransformersTower, config: EvoTokConfig) -> dict[str, Tensor]:
    weights = tower.model.state_dict()

    def find(*names: str) -> Tensor | None:
        return next((weights[name].float() for name in names if name in weights), None)

    patches = ("embeddings.patch_embedding", "embeddings.patch_embeddings.projection", "embeddings.patch_embeddings")
    kernel = find(*(f"{name}.weight" for name in patches))
    bias = find(*(f"{name}.bias" for name in patches))
    positions = find("embeddings.position_embedding.weight", "embeddings.position_embeddings")
    assert kernel is not None and positions is not None
    positions = positions.reshape(-1, positions.shape[-1])
    # Pixels x in [-1, 1] enter the teacher as (x / 2 + 1 / 2 - mean) / std.
    mean, std = (values.to(kernel).view(1, 3, 1, 1) for values in (tower.mean, tower.std))
    shift = (kernel * ((0.5 - mean) / std)).sum(dim=(1, 2, 3))
    state = {
        "embeddings.patch_embedding.weight": kernel * (0.5 / std),
        "embeddings.patch_embedding.bias": shift if bias is None else shift + bias,
    }
    if tower.num_special_tokens:
        token = find("embeddings.class_embedding", "embeddings.cls_token")
        assert token is not None
        special = [token.reshape(1, -1) + positions[:1]]
        if (registers := find("embeddings.register_tokens")) is not None:
            special.append(registers.reshape(-1, positions.shape[1]))
        state["embeddings.special_tokens"], positions = torch.cat(special), positions[1:]
    if positions.shape[0] != config.num_positions:
        raise UserError(
            f"the encoder cannot start from the teacher: it was trained with {positions.shape[0]} positions, the "
            f"tokenizer has {config.num_positions}; set image_size to {int(positions.shape[0] ** 0.5)} x patch_size "
            f"{config.patch_size}, or pass --init_encoder false"
        )
    state["embeddings.position_embedding.weight"] = positions
    if config.encoder_pre_norm:
        for name in ("weight", "bias"):
            state[f"embeddings.pre_norm.{name}"] = weights[f"pre_layrnorm.{name}"]
    return state


def _layer(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, value in weights.items():
        renamed = [re.sub(pattern, part, name) for pattern, part in _PARTS if re.match(pattern, name)]
        if not renamed and not name.startswith("layer_scale"):
            raise UserError(
                f"the encoder cannot start from the teacher: it has nothing like its weight {name}; pass "
                "--init_encoder false"
            )
        state |= dict.fromkeys(renamed, value)
    for scale, matrix in (("layer_scale1.lambda1", "self_attn.out_proj"), ("layer_scale2.lambda1", "mlp.fc2")):
        if scale in weights:
            state[f"{matrix}.weight"] = state[f"{matrix}.weight"] * weights[scale][:, None]
            state[f"{matrix}.bias"] = state[f"{matrix}.bias"] * weights[scale]
    return state
