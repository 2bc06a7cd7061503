"""The discrete image head: a small causal transformer over the levels of one position (DESIGN: depth transformer).

It stands behind any model that has one hidden state a position: `loss` trains it, `sample` draws with it.

B rows (one per image position), R rows drawn, G = 2 R rows with guidance (conditional first), L levels, C codebook_dim,
K codebook_size, D width of the model before it, W head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from evotok_plugin.losses.cross_entropy import chunked_cross_entropy


@dataclass(frozen=True)
class DepthTransformerConfig:
    """Sizes of a `DepthTransformerHead`; the defaults are the paper's.

    Attributes:
        llm_hidden_size: D, width of the hidden states that it reads.
        codebook_dim, codebook_size: dimensions of a code C and codes a level K, as the tokenizer has them.
        num_levels: L, levels that are drawn: the tokenizer's `pixel_depth`.
        hidden_size, num_layers, num_heads: of the transformer itself.
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
            raise ValueError(f"sizes of the image head must be at least 1, got {wrong[0]} {sizes[wrong[0]]}")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"the depth transformer is {self.hidden_size} wide, no multiple of {self.num_heads} heads")


@dataclass(frozen=True)
class SamplingOptions:
    """How a code is chosen from its logits; `top_k=0` and `top_p=1` switch those filters off."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"expected temperature >= 0, top_k >= 0 and 0 < top_p <= 1, got temperature={self.temperature}, "
                f"top_k={self.top_k}, top_p={self.top_p}"
            )


def sample(logits: Tensor, options: SamplingOptions, generators: Sequence[torch.Generator]) -> Tensor:
    """Draw one code a row: logits (R, K) -> (R,).

    Every row has its own generator and the draw is `argmax(probability / exponential noise)`, so a row does not
    depend on the rows beside it. Temperature 0 takes the most likely code.
    """
    if options.temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / options.temperature
    if 0 < options.top_k < logits.shape[-1]:
        kth = logits.topk(options.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    probabilities = logits.softmax(dim=-1)
    if options.top_p < 1:
        ordered, index = probabilities.sort(dim=-1, descending=True)
        # The most likely codes whose mass before them is still below top_p.
        outside = ordered.cumsum(dim=-1) - ordered >= options.top_p
        probabilities = probabilities.masked_fill(outside.gather(-1, index.argsort(dim=-1)), 0.0)
    noise = torch.stack([torch.empty(logits.shape[-1]).exponential_(generator=generator) for generator in generators])
    return (probabilities / noise.to(probabilities.device)).argmax(dim=-1)


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
    """Predicts the levels of one position from a model's hidden state there.

    Level 0 reads the hidden state; level l > 0 reads the sum of the codebook vectors of levels < l. One classifier
    (LayerNorm + Linear) per level that is drawn, none for levels that are not.
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
            level_latents: codebook vectors of the true codes, (B, L, C); the last level is not looked at.

        Returns:
            L tensors (B, K).

        Raises:
            ValueError: the shapes are not those of the head's configuration.
        """
        states = self._states(hidden, level_latents)
        return [classifier(states[:, level]) for level, classifier in enumerate(self.classifiers)]

    def _states(self, hidden: Tensor, level_latents: Tensor) -> Tensor:
        """What the classifiers of the levels see: (B, L, W)."""
        expected = (self.config.num_levels, self.config.codebook_dim)
        if tuple(level_latents.shape[1:]) != expected or hidden.shape[0] != level_latents.shape[0]:
            raise ValueError(
                f"expected level_latents (B, {expected[0]}, {expected[1]}), one row for each hidden state, got "
                f"{tuple(level_latents.shape)} and {tuple(hidden.shape)}; tokenizer.level_latents(codes) gives them "
                "for the first levels of the codes, positions then go into the first dimension"
            )
        sums = level_latents[:, :-1].cumsum(dim=1)  # (B, L - 1, C)
        x = torch.cat([self.from_hidden(hidden)[:, None], self.from_latent(sums)], dim=1) + self.level_embedding
        for block in self.blocks:
            x = block(x)
        return x

    def loss(self, hidden: Tensor, level_latents: Tensor, codes: Tensor) -> Tensor:
        """Mean cross-entropy over levels and positions, 0 without positions; codes (B, L), the rest as `forward`
        takes it. Logits are never there for all positions at once."""
        states, total = self._states(hidden, level_latents), 0.0
        for level, (norm, classifier) in enumerate(self.classifiers):
            normed, targets = norm(states[:, level]), codes[:, level]
            total = total + chunked_cross_entropy(classifier, normed, targets, self.config.codebook_size)
        return total / max(1, codes.numel())

    def step(self, level: int, conditioning: Tensor, cache: LevelCache) -> Tensor:
        """Logits (B, K) of one level while drawing.

        Args:
            level: which level; levels come in order, 0 first, with one `cache` per position.
            conditioning: for level 0 the model's hidden state (B, D), after that the sum of the levels drawn (B, C).
            cache: filled by the steps before; an empty one for level 0.
        """
        project = self.from_hidden if level == 0 else self.from_latent
        x = (project(conditioning) + self.level_embedding[level])[:, None]
        for index, block in enumerate(self.blocks):
            x = block(x, cache, index)
        return self.classifiers[level](x[:, 0])

    @torch.no_grad()
    def sample(
        self,
        hidden: Tensor,
        codebooks: Tensor,
        generators: Sequence[torch.Generator],
        options: SamplingOptions | None = None,
        guidance_scale: float = 1.0,
    ) -> Tensor:
        """Draw the levels of one position a row, each level once: codes (R, L).

        Args:
            hidden: the model's hidden states before the positions, (R, D); with classifier-free guidance (2 R, D),
                those with the prompt, then those without, in the same order.
            codebooks: the tokenizer's, (L or more, K, C): `tokenizer.quantizer.codebooks`.
            generators: R of them on the CPU, one a row; a row depends on its hidden state and its generator alone.
            options: temperature, top-k and top-p; without them the codes are drawn from the whole distribution.
            guidance_scale: how far the logits are pushed away from those without the prompt; 1 is no guidance.

        Raises:
            ValueError: rows and generators do not match, or the codebooks are not those of the configuration.
        """
        config, num_rows, guided = self.config, len(generators), guidance_scale != 1
        if not num_rows or hidden.shape[0] != num_rows * (1 + guided):
            raise ValueError(
                f"{hidden.shape[0]} hidden states for {num_rows} generators and guidance_scale {guidance_scale}; "
                "expected one for each, at another scale than 1 two: those with the prompt, then those without"
            )
        if codebooks.shape[0] < config.num_levels or codebooks.shape[1:] != (config.codebook_size, config.codebook_dim):
            raise ValueError(
                f"expected codebooks ({config.num_levels} or more, {config.codebook_size}, {config.codebook_dim}), "
                f"got {tuple(codebooks.shape)}; the head was made for another tokenizer"
            )
        options, cache = options or SamplingOptions(), LevelCache()
        conditioning, codes, total = hidden, [], 0.0
        for level in range(config.num_levels):
            logits = self.step(level, conditioning, cache)
            if guided:
                conditional, unconditional = logits[:num_rows], logits[num_rows:]
                logits = unconditional + guidance_scale * (conditional - unconditional)
            codes.append(sample(logits, options, generators))
            total = total + F.embedding(codes[-1], codebooks[level])  # the sum stays in float32
            latents = total.to(hidden.dtype)
            conditioning = torch.cat([latents, latents]) if guided else latents
        return torch.stack(codes, dim=1)
