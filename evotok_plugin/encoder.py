"""Pixels to latents: SigLIP's vision tower without its last layer, then a small bottleneck.

The layers have the names of those in transformers' `SiglipVisionModel`, so that its weights can be copied, but are
plain PyTorch: the tower must not depend on a version of transformers.

B batch, N positions, D width, C codebook_dim.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from evotok_plugin.checkpointed_layer import CheckpointedLayer
from evotok_plugin.positions import resize_positions
from evotok_plugin.tokenizer_settings import TokenizerSettings


class PatchEmbeddings(nn.Module):
    """Images (B, 3, H, W) -> patches with position embeddings (B, N, D); H and W are multiples of the patch size."""

    def __init__(self, config: TokenizerSettings) -> None:
        super().__init__()
        width, self.patch_size = config.encoder_hidden_size, config.patch_size
        self.grid_size = config.grid_size
        self.patch_embedding = nn.Conv2d(config.num_channels, width, self.patch_size, self.patch_size)
        self.position_embedding = nn.Embedding(config.num_positions, width)

    def forward(self, pixel_values: Tensor) -> Tensor:
        project, positions = self.patch_embedding, self.position_embedding.weight
        grid = (pixel_values.shape[2] // self.patch_size, pixel_values.shape[3] // self.patch_size)
        if grid != (self.grid_size, self.grid_size):
            positions = resize_positions(positions, self.grid_size, grid)
        return project(pixel_values.to(project.weight.dtype)).flatten(2).transpose(1, 2) + positions


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
    """Two linear layers with SigLIP's approximation of GELU between them."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class EncoderLayer(CheckpointedLayer):
    """Pre-norm self-attention and MLP."""

    def __init__(self, config: TokenizerSettings) -> None:
        super().__init__()
        width = config.encoder_hidden_size
        self.layer_norm1 = nn.LayerNorm(width, eps=1e-6)
        self.self_attn = EncoderAttention(width, config.encoder_num_heads)
        self.layer_norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = EncoderMLP(width, config.encoder_intermediate_size)

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
        self.embeddings = PatchEmbeddings(config)
        self.encoder = EncoderLayers(config)
        self.to_latent = nn.Sequential(
            nn.Linear(config.encoder_hidden_size, config.encoder_hidden_size),
            nn.Tanh(),
            nn.Linear(config.encoder_hidden_size, config.codebook_dim),
        )

    def features(self, pixel_values: Tensor) -> Tensor:
        """Features of the tower (B, N, D), before the bottleneck."""
        return self.encoder(self.embeddings(pixel_values))

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.to_latent(self.features(pixel_values))
