"""The discrete image head: a small causal transformer over the levels of one position (DESIGN: depth transformer).

B rows (one per image position), L levels, C codebook_dim, K codebook_size, W head width.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class LevelCache:
    """Keys and values of the levels drawn so far, one pair per block: (B, heads, levels, W / heads)."""

    keys: list[Tensor | None] = field(default_factory=list)
    values: list[Tensor | None] = field(default_factory=list)

    def extend(self, block: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append one level's key and value to a block's and return all of them."""
        if block == len(self.keys):
            self.keys.append(key)
            self.values.append(value)
        else:
            self.keys[block] = torch.cat([self.keys[block], key], dim=2)
            self.values[block] = torch.cat([self.values[block], value], dim=2)
        return self.keys[block], self.values[block]


class DepthBlock(nn.Module):
    """Pre-norm causal self-attention over levels, then a GELU MLP of four times the width."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_1 = nn.LayerNorm(hidden_size)
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)
        self.norm_2 = nn.LayerNorm(hidden_size)
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, 4 * hidden_size), nn.GELU(), nn.Linear(4 * hidden_size, hidden_size)
        )

    def forward(self, x: Tensor, cache: LevelCache | None = None, block: int = 0) -> Tensor:
        batch, levels, width = x.shape
        qkv = self.qkv(self.norm_1(x)).view(batch, levels, 3, self.num_heads, width // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, levels, W / heads)
        if cache is not None:
            key, value = cache.extend(block, key, value)
        # With a cache one level comes at a time and may look at all that is cached.
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=cache is None)
        x = x + self.proj(attended.transpose(1, 2).reshape(batch, levels, width))
        return x + self.mlp(self.norm_2(x))


class DepthTransformerHead(nn.Module):
    """Predicts the levels of one position from the LLM's hidden state there.

    Level 0 reads the hidden state; level l > 0 reads the sum of the codebook vectors of levels < l. One classifier
    (LayerNorm + Linear) per level that is drawn, none for levels that are not.
    """

    def __init__(
        self,
        llm_hidden_size: int,
        codebook_dim: int,
        codebook_size: int,
        num_levels: int,
        hidden_size: int,
        num_layers: int,
        num_heads: int,
    ) -> None:
        super().__init__()
        self.num_levels = num_levels
        self.from_hidden = nn.Linear(llm_hidden_size, hidden_size)
        self.from_latent = nn.Linear(codebook_dim, hidden_size)
        self.level_embedding = nn.Parameter(torch.zeros(num_levels, hidden_size))
        self.blocks = nn.ModuleList(DepthBlock(hidden_size, num_heads) for _ in range(num_layers))
        self.classifiers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(hidden_size), nn.Linear(hidden_size, codebook_size)) for _ in range(num_levels)
        )

    def forward(self, hidden: Tensor, level_latents: Tensor) -> list[Tensor]:
        """Teacher-forced logits of every level.

        Args:
            hidden: the LLM's hidden states before each position, (B, D).
            level_latents: codebook vectors of the true codes, (B, L, C); the last level is not looked at.

        Returns:
            L tensors (B, K).
        """
        sums = level_latents[:, :-1].cumsum(dim=1)  # (B, L - 1, C)
        x = torch.cat([self.from_hidden(hidden)[:, None], self.from_latent(sums)], dim=1) + self.level_embedding
        for block in self.blocks:
            x = block(x)
        return [classifier(x[:, level]) for level, classifier in enumerate(self.classifiers)]

    def step(self, level: int, conditioning: Tensor, cache: LevelCache) -> Tensor:
        """Logits (B, K) of one level while drawing.

        Args:
            level: which level; levels come in order, 0 first, with one `cache` per position.
            conditioning: for level 0 the LLM's hidden state (B, D), after that the sum of the levels drawn (B, C).
            cache: filled by the steps before; an empty one for level 0.
        """
        project = self.from_hidden if level == 0 else self.from_latent
        x = (project(conditioning) + self.level_embedding[level])[:, None]
        for index, block in enumerate(self.blocks):
            x = block(x, cache, index)
        return self.classifiers[level](x[:, 0])

    def loss(self, hidden: Tensor, level_latents: Tensor, codes: Tensor) -> Tensor:
        """Mean cross-entropy over levels and positions; codes (B, L)."""
        logits = self(hidden, level_latents)
        terms = [F.cross_entropy(level_logits.float(), codes[:, level]) for level, level_logits in enumerate(logits)]
        return torch.stack(terms).mean()
