"""Latents to semantic features: a small ViT, designed like the VQ-KD decoder of BEiT v2.

B batch, N positions, C codebook_dim, W decoder width, D semantic_dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evotok_plugin.checkpointed_layer import CheckpointedLayer
from evotok_plugin.positions import resize_positions
from evotok_plugin.tokenizer_settings import TokenizerSettings


class SemanticAttention(nn.Module):
    """Self-attention whose inner width may differ from the model's; queries and values have biases, keys do not."""

    def __init__(self, hidden_size: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads, inner = num_heads, num_heads * head_dim
        self.query = nn.Linear(hidden_size, inner)
        self.key = nn.Linear(hidden_size, inner, bias=False)
        self.value = nn.Linear(hidden_size, inner)
        self.proj = nn.Linear(inner, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class SemanticBlock(CheckpointedLayer):
    """Pre-norm self-attention and a GELU MLP."""

    def __init__(self, hidden_size: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.attention = SemanticAttention(hidden_size, num_heads, head_dim)
        self.norm_2 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, 4 * hidden_size), nn.GELU(), nn.Linear(4 * hidden_size, hidden_size)
        )

    def compute(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class SemanticDecoder(nn.Module):
    """Latents (B, N, C) of a grid (rows, columns) of positions -> features (B, N, D)."""

    def __init__(self, config: TokenizerSettings) -> None:
        super().__init__()
        width = config.semantic_hidden_size
        self.grid_size = config.grid_size
        self.from_latent = nn.Linear(config.codebook_dim, width)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position_embedding = nn.Parameter(torch.zeros(1, config.num_positions + 1, width))
        self.blocks = nn.ModuleList(
            SemanticBlock(width, config.semantic_num_heads, config.semantic_head_dim)
            for _ in range(config.semantic_num_layers)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.to_features = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, config.semantic_dim))

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        """Position embeddings (1, 1 + N, W), that of the class token first."""
        if grid == (self.grid_size, self.grid_size):
            return self.position_embedding
        resized = resize_positions(self.position_embedding[0, 1:], self.grid_size, grid)
        return torch.cat([self.position_embedding[:, :1], resized[None]], dim=1)

    def forward(self, latents: Tensor, grid: tuple[int, int]) -> Tensor:
        x = self.from_latent(latents)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1) + self._positions(grid)
        for block in self.blocks:
            x = block(x)
        return self.to_features(self.norm(x[:, 1:]))
