"""Pixels to latents through a pretrained CNN beside a pixel stem: the latents are a linear map of both.

A network that was trained to recognize objects knows what is in a patch, but not exactly how it looks; the stem is a
linear map of the patch's pixels. Their shares in the variance of the latents decide which of the two the first levels
of codes describe.

B batch, N positions, D channels of the CNN, C codebook_dim.
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evotok_plugin.encoder import EvoTokEncoder
from evotok_plugin.errors import UserError
from evotok_plugin.teachers.timm_towers import create_timm_network
from evotok_plugin.tokenizer_settings import TokenizerSettings


class FrozenBackbone(nn.Module):
    """A CNN of timm up to one of its stages; images (B, 3, H, W) in [-1, 1] -> features (B, N, D) without gradients.

    The images are resized so that the stage has the tokenizer's positions.

    Attributes:
        remember: a cache: given the images and the computation, it returns the features.

    Raises:
        UserError: timm is not installed, or does not have the network or the stage.
    """

    def __init__(self, config: TokenizerSettings) -> None:
        super().__init__()
        network = create_timm_network(config.encoder_backbone)
        info, stage = network.feature_info, config.encoder_backbone_stage
        if not -len(info) <= stage < len(info):
            raise UserError(
                f"encoder_backbone_stage: {config.encoder_backbone} has stages 0 to {len(info) - 1}, or from the end "
                f"-{len(info)} to -1; got {stage}"
            )
        self.stage, self.width, self.stride = stage % len(info), info[stage]["num_chs"], info[stage]["reduction"]
        network.prune_intermediate_layers(indices=[self.stage], prune_norm=False, prune_head=True)
        self.network = network.requires_grad_(False).eval()
        self.patch_size = config.patch_size
        self._mean, self._std = (list(network.pretrained_cfg[name]) for name in ("mean", "std"))
        self.remember: Callable[[Tensor, Callable[[Tensor], list[Tensor]]], list[Tensor]] | None = None

    def train(self, mode: bool = True) -> "FrozenBackbone":
        """Stay in evaluation mode: the statistics of batch norms are those of the pretraining."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> Tensor:
        if self.remember is not None:
            return self.remember(pixel_values, self._features)[0]
        return self._features(pixel_values)[0]

    def _features(self, pixel_values: Tensor) -> list[Tensor]:
        size = [side // self.patch_size * self.stride for side in pixel_values.shape[2:]]
        if size != list(pixel_values.shape[2:]):
            enlarged = F.interpolate(pixel_values.float(), size, mode="bicubic", antialias=True, align_corners=False)
            pixel_values = enlarged.clamp(-1, 1)
        weight = next(self.network.parameters())
        mean, std = (pixel_values.new_tensor(values).view(3, 1, 1) for values in (self._mean, self._std))
        pixels = (((pixel_values + 1) / 2 - mean) / std).to(weight.dtype)
        (features,) = self.network.forward_intermediates(pixels, indices=[self.stage], intermediates_only=True)
        return [features.flatten(2).transpose(1, 2)]


class BackboneEncoder(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] -> latents (B, N, C): linear in the pixels and in the features of each patch.

    `init_from_images` makes the latents the principal components of both.
    """

    feature_mean: Tensor
    feature_std: Tensor

    def __init__(self, config: TokenizerSettings) -> None:
        super().__init__()
        self.backbone = FrozenBackbone(config)
        patch, dim = config.patch_size, config.codebook_dim
        self.stem = nn.Conv2d(config.num_channels, dim, patch, patch)
        self.from_features = nn.Linear(self.backbone.width, dim, bias=False)
        self.register_buffer("feature_mean", torch.zeros(self.backbone.width))
        self.register_buffer("feature_std", torch.ones(self.backbone.width))

    def forward(self, pixel_values: Tensor) -> Tensor:
        features = (self.backbone(pixel_values) - self.feature_mean) / self.feature_std
        pixels = self.stem(pixel_values.to(self.stem.weight.dtype)).flatten(2).transpose(1, 2)
        return pixels + self.from_features(features.to(pixels.dtype))

    @torch.no_grad()
    def init_from_images(self, batches: Iterable[Tensor], semantic_share: float) -> None:
        """Set the maps to the principal components of pixels and features, as measured on images.

        Pixels have the total variance 1, features `semantic_share` squared, with equal variance in every channel. The
        latents then have the variance 1 in the mean over dimensions.

        Args:
            batches: images (B, 3, H, W) in [-1, 1].

        Raises:
            UserError: there are fewer positions than dimensions.
        """
        patches, features = [], []
        patch, dim = self.backbone.patch_size, self.from_features.out_features
        for pixel_values in batches:
            patches.append(F.unfold(pixel_values.float(), patch, stride=patch).transpose(1, 2).flatten(0, 1))
            features.append(self.backbone(pixel_values).float().flatten(0, 1))
        if not patches or sum(map(len, patches)) <= dim:
            raise UserError(f"the encoder starts from more than {dim} positions of images; raise kmeans_images")
        pixels, seen = torch.cat(patches), torch.cat(features)
        self.feature_mean.copy_(seen.mean(0))
        std = seen.std(0, correction=0)
        self.feature_std.copy_(torch.where(std > 1e-6 * std.max(), std, torch.ones_like(std)))
        scale = (pixels.var(0, correction=0).sum()).sqrt()
        standard = (seen - self.feature_mean) / self.feature_std * (semantic_share / seen.shape[1] ** 0.5)
        center = pixels.mean(0)
        joint = torch.cat([(pixels - center) / scale, standard], dim=1).double()
        values, vectors = torch.linalg.eigh(joint.T @ joint / len(joint))  # ascending
        axes = (vectors[:, -dim:].flip(1) / values[-dim:].mean().sqrt()).T.float()  # (C, patch * patch * 3 + D)
        to_pixels = axes[:, : pixels.shape[1]] / scale
        self.stem.weight.copy_(to_pixels.reshape(self.stem.weight.shape))
        assert self.stem.bias is not None
        self.stem.bias.copy_(-(to_pixels @ center))
        self.from_features.weight.copy_(axes[:, pixels.shape[1] :] * (semantic_share / seen.shape[1] ** 0.5))


def build_encoder(config: TokenizerSettings) -> EvoTokEncoder | BackboneEncoder:
    """The encoder that a configuration describes."""
    return BackboneEncoder(config) if config.encoder_backbone else EvoTokEncoder(config)
