"""The discrete image head: a small causal transformer over the levels of one position (a depth transformer).

It follows any model that gives one hidden state per position: `loss` trains the head, `sample` draws codes with it.

B rows (one per image position), R rows drawn, L levels, C codebook_dim, K codebook_size, D width of the hidden states,
W head width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from evotok_plugin.errors import UserError
from evotok_plugin.guidance import Scale, guided_logits, scale_at_level
from evotok_plugin.kernels.thin_linear import thin_linear
from evotok_plugin.losses.cross_entropy import chunked_cross_entropy
from evotok_plugin.sampling import SamplingOptions, sample


@dataclass(frozen=True)
class DepthTransformerConfig:
    """Sizes of a `DepthTransformerHead`; the defaults are the paper's.

    Attributes:
        llm_hidden_size: D, width of the hidden states that the head reads.
        codebook_dim, codebook_size: dimensions of a code C and codes per level K, as in the tokenizer.
        num_levels: L, number of levels to draw: the tokenizer's `pixel_depth`.
        hidden_size, num_layers, num_heads: sizes of the transformer itself.

    Raises:
        UserError: sizes below 1, or a width that is not a multiple of the number of heads.
    """

    llm_hidden_size: int
    codebook_dim: int
    codebook_size: int
    num_levels: int
    hidden_size: int = 2560
    num_layers: int = 6
    num_heads: int = 40

    def __post_init__(self) -> None:
        sizes = vars(self)
        if wrong := [name for name, size in sizes.items() if size < 1]:
            raise UserError(f"sizes of the image head must be at least 1, got {wrong[0]} {sizes[wrong[0]]}")
        if self.hidden_size % self.num_heads:
            raise UserError(
                f"the width of the depth transformer must be a multiple of its {self.num_heads} heads, got "
                f"{self.hidden_size}"
            )


class LevelCache:
    """Keys and values of every block for the levels drawn so far, one position per row; reused for all positions.

    Attributes:
        keys, values: (blocks, B, heads, L, W / heads).
    """

    def __init__(self, config: DepthTransformerConfig, num_rows: int, like: Tensor) -> None:
        """Allocate the cache with the device and dtype of the tensor `like`."""
        sizes = (config.num_heads, config.num_levels, config.hidden_size // config.num_heads)
        self.keys, self.values = like.new_empty(2, config.num_layers, num_rows, *sizes)

    def extend(self, block: int, level: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store one level's key and value (B, heads, 1, W / heads) of a block; return those of all levels up to it."""
        self.keys[block, :, :, level] = key[:, :, 0]
        self.values[block, :, :, level] = value[:, :, 0]
        return self.keys[block, :, :, : level + 1], self.values[block, :, :, : level + 1]


class DepthBlock(GradientCheckpointingLayer):
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

    def forward(self, x: Tensor, cache: LevelCache | None = None, block: int = 0, level: int = 0) -> Tensor:
        batch, levels, width = x.shape
        linear = nn.Module.__call__ if cache is None else thin_linear
        qkv = linear(self.qkv, self.norm_1(x)).view(batch, levels, 3, self.num_heads, width // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, levels, W / heads)
        if cache is not None:
            key, value = cache.extend(block, level, key, value)
        # With a cache, levels come one at a time and attend to everything cached.
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=cache is None)
        x = x + linear(self.proj, attended.transpose(1, 2).reshape(batch, levels, width))
        widen, activation, narrow = self.mlp
        return x + linear(narrow, activation(linear(widen, self.norm_2(x))))


class DepthTransformerHead(nn.Module):
    """Predicts the codes of one position, level by level, from the hidden state of the model before it.

    Level 0 reads the hidden state; level l > 0 reads the sum of the codebook vectors of levels < l. Every level that is
    drawn has its own classifier (LayerNorm + Linear).
    """

    def __init__(self, config: DepthTransformerConfig) -> None:
        super().__init__()
        self.config, self.num_levels, width = config, config.num_levels, config.hidden_size
        self.from_hidden = nn.Linear(config.llm_hidden_size, width)
        self.from_latent = nn.Linear(config.codebook_dim, width)
        self.level_embedding = nn.Parameter(torch.empty(config.num_levels, width))
        nn.init.normal_(self.level_embedding, std=0.02)
        self.blocks = nn.ModuleList(DepthBlock(width, config.num_heads) for _ in range(config.num_layers))
        self.classifiers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, config.codebook_size)) for _ in range(config.num_levels)
        )

    def forward(self, hidden: Tensor, level_latents: Tensor) -> list[Tensor]:
        """Teacher-forced logits of every level.

        Args:
            hidden: the model's hidden states before each position, (B, D).
            level_latents: codebook vectors of the true codes, (B, L, C); the last level is not used.

        Returns:
            L tensors (B, K).

        Raises:
            ValueError: the shapes do not match the head's configuration.
        """
        states = self._states(hidden, level_latents)
        return [classifier(states[:, level]) for level, classifier in enumerate(self.classifiers)]

    def _classifier(self, level: int) -> tuple[nn.Module, nn.Module]:
        """The norm and the linear layer of one level's classifier."""
        norm, linear = self.classifiers[level].children()
        return norm, linear

    def _states(self, hidden: Tensor, level_latents: Tensor) -> Tensor:
        """Inputs of the classifiers of all levels: (B, L, W)."""
        expected = (self.config.num_levels, self.config.codebook_dim)
        if tuple(level_latents.shape[1:]) != expected or hidden.shape[0] != level_latents.shape[0]:
            raise ValueError(
                f"expected level_latents (B, {expected[0]}, {expected[1]}), one row for each hidden state, got "
                f"{tuple(level_latents.shape)} and {tuple(hidden.shape)}; compute them with "
                "tokenizer.level_latents(codes) from the first levels of the codes, and flatten the positions"
            )
        sums = level_latents[:, :-1].cumsum(dim=1)  # (B, L - 1, C)
        x = torch.cat([self.from_hidden(hidden)[:, None], self.from_latent(sums)], dim=1) + self.level_embedding
        for block in self.blocks:
            x = block(x)
        return x

    def loss(self, hidden: Tensor, level_latents: Tensor, codes: Tensor) -> Tensor:
        """Mean cross-entropy over levels and positions, 0 without positions; never holds the logits of all positions.

        Args:
            hidden, level_latents: as in `forward`.
            codes: the true codes (B, L).
        """
        states = self._states(hidden, level_latents)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for level in range(self.num_levels):
            norm, classifier = self._classifier(level)
            normed, targets = norm(states[:, level]), codes[:, level]
            total = total + chunked_cross_entropy(classifier, normed, targets, self.config.codebook_size)
        return total / max(1, codes.numel())

    def new_cache(self, num_rows: int) -> LevelCache:
        """Allocate a cache for the levels of one position in each of `num_rows` rows."""
        return LevelCache(self.config, num_rows, self.level_embedding)

    def step(self, level: int, conditioning: Tensor, cache: LevelCache) -> Tensor:
        """Logits (B, K) of one level while drawing.

        Args:
            level: the level to predict; call with 0, 1, .. in order.
            conditioning: for level 0 the model's hidden state (B, D), then the sum of the levels drawn so far (B, C).
            cache: holds the earlier levels; entries of another position are overwritten.
        """
        project = self.from_hidden if level == 0 else self.from_latent
        x = (thin_linear(project, conditioning) + self.level_embedding[level])[:, None]
        for index, block in enumerate(self.blocks):
            x = block(x, cache, index, level)
        norm, classifier = self._classifier(level)
        return thin_linear(classifier, norm(x[:, 0]))

    @torch.no_grad()
    def sample(
        self,
        hidden: Tensor,
        codebooks: Tensor,
        noise: Tensor,
        options: SamplingOptions | None = None,
        guidance_scale: Scale = 1.0,
        cache: LevelCache | None = None,
        guidance_rescale: float = 0.0,
    ) -> Tensor:
        """Draw the codes of one position per row, all levels once: (R, L).

        Args:
            hidden: the model's hidden states before the positions, (R, D); with classifier-free guidance (2 R, D),
                those with the prompt, then those without, in the same order.
            codebooks: the tokenizer's codebooks (L or more, K, C): `tokenizer.quantizer.codebooks`.
            noise: (R, L) in [0, 1), which decides each draw (`uniform_noise` creates it from a seed); a row depends
                only on its hidden state and its noise.
            options: how codes are chosen; by default drawn from the full distribution.
            guidance_scale: weight of the difference between the logits with and without the prompt; ignored with one
                hidden state per row. One number or one per level, also as a float32 tensor, or (R, L) as such a tensor.
            cache: from `new_cache`, with as many rows as there are hidden states; by default a new one.
            guidance_rescale: as in `guided_logits`.

        Raises:
            ValueError: rows and noise do not match, or the codebooks do not match the configuration.
        """
        config, num_rows, options = self.config, noise.shape[0], options or SamplingOptions()
        guided = hidden.shape[0] == 2 * num_rows
        if noise.shape[1:] != (config.num_levels,) or not num_rows or hidden.shape[0] not in (num_rows, 2 * num_rows):
            raise ValueError(
                f"{hidden.shape[0]} hidden states for noise of shape {tuple(noise.shape)}; expected noise (R, "
                f"{config.num_levels}) and R hidden states, with guidance 2 R: with the prompt, then without"
            )
        if codebooks.shape[0] < config.num_levels or codebooks.shape[1:] != (config.codebook_size, config.codebook_dim):
            raise ValueError(
                f"expected codebooks ({config.num_levels} or more, {config.codebook_size}, {config.codebook_dim}), "
                f"got {tuple(codebooks.shape)}; the head was made for another tokenizer"
            )
        cache = cache or self.new_cache(hidden.shape[0])
        conditioning, codes = hidden, list[Tensor]()
        total: Tensor | None = None
        for level in range(config.num_levels):
            logits = self.step(level, conditioning, cache)
            if guided:
                logits = guided_logits(logits, scale_at_level(guidance_scale, level), guidance_rescale)
            codes.append(sample(logits, options.at_level(level), noise[:, level]))
            drawn = F.embedding(codes[-1], codebooks[level])
            total = drawn if total is None else total + drawn  # the sum stays in float32
            latents = total.to(hidden.dtype)
            conditioning = torch.cat([latents, latents]) if guided else latents
        return torch.stack(codes, dim=1)
