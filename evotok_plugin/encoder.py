"""Pixels to latents: SigLIP's vision tower without its last layer, then a small bottleneck.

The layers have the names of those in transformers' `SiglipVisionModel`, so that its weights can be copied, but are
plain PyTorch: the tower must not depend on a version of transformers. With other settings they compute the towers of
CLIP, ViT and DINOv2.

B batch, S special tokens, N positions, D width, C codebook_dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evotok_plugin.checkpointed_layer import CheckpointedLayer
from evotok_plugin.errors import UserError
from evotok_plugin.positions import resize_positions
from evotok_plugin.tokenizer_settings import TokenizerSettings


class PatchEmbeddings(nn.Module):
    """Images (B, 3, H, W) -> special tokens and patches with position embeddings (B, S + N, D).

    H and W are multiples of the patch size.
    """

    def __init__(self, config: TokenizerSettings) -> None:
        super().__init__()
        width, self.patch_size = config.encoder_hidden_size, config.patch_size
        self.grid_size = config.grid_size
        self.patch_embedding = nn.Conv2d(config.num_channels, width, self.patch_size, self.patch_size)
        self.position_embedding = nn.Embedding(config.num_positions, width)
        special = config.encoder_num_special_tokens
        self.special_tokens = nn.Parameter(torch.zeros(special, width)) if special else None
        self.pre_norm = nn.LayerNorm(width, eps=config.encoder_norm_eps) if config.encoder_pre_norm else None

    def forward(self, pixel_values: Tensor) -> Tensor:
        project, positions = self.patch_embedding, self.position_embedding.weight
        grid = (pixel_values.shape[2] // self.patch_size, pixel_values.shape[3] // self.patch_size)
        if grid != (self.grid_size, self.grid_size):
            positions = resize_positions(positions, self.grid_size, grid)
        x = project(pixel_values.to(project.weight.dtype)).flatten(2).transpose(1, 2) + positions
        if self.special_tokens is not None:
            x = torch.cat([self.special_tokens.expand(x.shape[0], -1, -1), x], dim=1)
        return x if self.pre_norm is None else self.pre_norm(x)


class EncoderAttention(nn.Module):
    """Self-attention of all positions."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class EncoderMLP(nn.Module):
    """Two linear layers with an activation function between them."""

    def __init__(self, width: int, inner: int, activation: str) -> None:
        super().__init__()
        self.activation = activation
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        if self.activation == "quick_gelu":  # CLIP's approximation
            return self.fc2(x * torch.sigmoid(1.702 * x))
        return self.fc2(F.gelu(x, approximate="tanh" if self.activation == "gelu_tanh" else "none"))


class EncoderLayer(CheckpointedLayer):
    """Pre-norm self-attention and MLP."""

    def __init__(self, config: TokenizerSettings) -> None:
        super().__init__()
        width = config.encoder_hidden_size
        self.layer_norm1 = nn.LayerNorm(width, eps=config.encoder_norm_eps)
        self.self_attn = EncoderAttention(width, config.encoder_num_heads)
        self.layer_norm2 = nn.LayerNorm(width, eps=config.encoder_norm_eps)
        self.mlp = EncoderMLP(width, config.encoder_intermediate_size, config.encoder_activation)

    def compute(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class EncoderLayers(nn.Module):
    """The layers, one after the other: (B, N, D) -> (B, N, D)."""

    def __init__(self, config: TokenizerSettings) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_num_layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class EvoTokEncoder(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] -> latents (B, N, C); H and W must be multiples of the patch size.

    The features are SigLIP's `hidden_states[-2]`, so its last layer, final norm and pooling head, which would never
    get a gradient, are left out.
    """

    def __init__(self, config: TokenizerSettings) -> None:
        super().__init__()
        if config.encoder_backbone:
            raise UserError(
                f"this tokenizer's encoder is timm's {config.encoder_backbone}, which the vision tower for other hosts "
                "does not contain; use a tokenizer with a ViT as encoder, or the vision tower of this project's models"
            )
        self.embeddings = PatchEmbeddings(config)
        self.encoder = EncoderLayers(config)
        self.to_latent = nn.Sequential(
            nn.Linear(config.encoder_hidden_size, config.encoder_hidden_size),
            nn.Tanh(),
            nn.Linear(config.encoder_hidden_size, config.codebook_dim),
        )

        self._num_special = config.encoder_num_special_tokens

    def features(self, pixel_values: Tensor) -> Tensor:
        """Features of the tower (B, N, D), before the bottleneck."""
        return self.encoder(self.embeddings(pixel_values))[:, self._num_special :]

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.to_latent(self.features(pixel_values))
