"""Latents to pixels: a convolutional decoder as in VQGAN (Esser et al. 2021), sized by the configuration.

B batch, C codebook_dim, h w positions, H W pixels.

Gradient checkpointing recomputes single residual and attention blocks: at the paper's sizes this needs less than half
the memory of storing all activations. Recomputing whole stages would save less, because all activations of the finest
stage would then be in memory at once.
"""

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from evotok_plugin.configuration_evotok import EvoTokConfig


class ResidualBlock(GradientCheckpointingLayer):
    """Two GroupNorm - SiLU - 3x3 convolution layers with a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, norm_groups: int) -> None:
        super().__init__()
        self.norm_1 = nn.GroupNorm(norm_groups, in_channels, eps=1e-6)
        self.conv_1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm_2 = nn.GroupNorm(norm_groups, out_channels, eps=1e-6)
        self.conv_2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_1(F.silu(self.norm_1(x)))
        return self.shortcut(x) + self.conv_2(F.silu(self.norm_2(h)))


class AttentionBlock(GradientCheckpointingLayer):
    """Single-head self-attention over all positions."""

    def __init__(self, channels: int, norm_groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(norm_groups, channels, eps=1e-6)
        self.query, self.key, self.value, self.proj = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        query, key, value = (
            layer(h).flatten(2).transpose(1, 2)[:, None] for layer in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(query, key, value)[:, 0].transpose(1, 2)
        return x + self.proj(attended.unflatten(2, x.shape[2:]))


class UpStage(nn.Module):
    """Residual blocks of one resolution, optionally with attention, then upsampling to the next resolution.

    Args:
        scale: upsampling factor; None for the last stage. A factor of 2 repeats every value; smaller factors, which
            would repeat only some values, interpolate bilinearly.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_blocks: int,
        norm_groups: int,
        attention: bool,
        scale: float | None,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            ResidualBlock(in_channels if i == 0 else out_channels, out_channels, norm_groups) for i in range(num_blocks)
        )
        self.attention = nn.ModuleList(
            AttentionBlock(out_channels, norm_groups) if attention else nn.Identity() for _ in range(num_blocks)
        )
        self.scale = scale
        self.upsample = nn.Conv2d(out_channels, out_channels, 3, padding=1) if scale else None

    def forward(self, x: Tensor) -> Tensor:
        for block, attention in zip(self.blocks, self.attention, strict=True):
            x = attention(block(x))
        if self.upsample is not None:
            mode = "nearest" if self.scale == 2 else "bilinear"
            x = self.upsample(F.interpolate(x, scale_factor=self.scale, mode=mode))
        return x


class PixelDecoder(nn.Module):
    """Latents (B, C, h, w) -> pixels (B, 3, H, W), not clamped."""

    def __init__(self, config: EvoTokConfig) -> None:
        super().__init__()
        groups = config.decoder_norm_groups
        widths = [config.decoder_channels * multiplier for multiplier in config.decoder_channel_multipliers]
        lowest = widths[-1]
        self.from_latent = nn.Conv2d(config.codebook_dim, config.pixel_latent_channels, 1)
        self.conv_in = nn.Conv2d(config.pixel_latent_channels, lowest, 3, padding=1)
        self.middle = nn.Sequential(
            ResidualBlock(lowest, lowest, groups), AttentionBlock(lowest, groups), ResidualBlock(lowest, lowest, groups)
        )
        stages, channels, num_blocks = [], lowest, config.decoder_num_res_blocks + 1
        scales = [*config.decoder_scales, None]
        for index, (width, scale) in enumerate(zip(reversed(widths), scales, strict=True)):
            stages.append(UpStage(channels, width, num_blocks, groups, attention=index == 0, scale=scale))
            channels = width
        self.stages = nn.Sequential(*stages)
        self.norm_out = nn.GroupNorm(groups, channels, eps=1e-6)
        self.conv_out = nn.Conv2d(channels, config.num_channels, 3, padding=1)

    @property
    def last_layer(self) -> nn.Parameter:
        """Weight whose gradients balance the adversarial term, see `evotok_plugin.losses.adversarial`."""
        weight = self.conv_out.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def forward(self, latents: Tensor) -> Tensor:
        x = self.stages(self.middle(self.conv_in(self.from_latent(latents))))
        return self.conv_out(F.silu(self.norm_out(x)))
