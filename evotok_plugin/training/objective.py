"""The tokenizer's loss, by name: pixels, LPIPS, PatchGAN, commitment, and the two cosines to the teacher."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evotok_plugin.losses.adversarial import (
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
)
from evotok_plugin.losses.perceptual import load_lpips
from evotok_plugin.losses.semantic import cosine_loss, folded_cosine_loss
from evotok_plugin.modeling_evotok import EvoTokModel, EvoTokOutput
from evotok_plugin.teacher import Teacher, TeacherSettings, load_teacher
from evotok_plugin.teachers.initial_encoder import init_encoder
from evotok_plugin.training.config import TokenizerTrainingConfig


class TokenizerObjective:
    """The loss terms of the tokenizer, with their frozen networks and the discriminator.

    Raises:
        UserError: the teacher or LPIPS cannot be loaded, or the teacher does not fit the model.
    """

    def __init__(self, config: TokenizerTrainingConfig, model: EvoTokModel) -> None:
        self._config, self._last_layer = config, model.pixel_decoder.last_layer
        device = model.device
        self.teacher: Teacher | None = None
        self.heads: AlignmentHeads | None = None
        if config.semantic_weight > 0:
            assert config.teacher is not None  # TokenizerTrainingConfig has checked it
            settings = TeacherSettings(config.teacher_layer, config.teacher_size, config.teacher_standardize)
            self.teacher = load_teacher(config.teacher, settings).to(device)
            if config.init_encoder and config.init_from is None:
                init_encoder(model.encoder, model.config, self.teacher.tower)
            self.teacher.fit_to(model.config)
            if widths := self.teacher.extra_depths:
                self.heads = AlignmentHeads(model.config.codebook_dim, widths).to(device)
        trains_pixels = config.train_parts != "semantic_decoder"
        self.lpips = load_lpips().to(device) if config.lpips_weight > 0 and trains_pixels else None
        self.discriminator = PatchDiscriminator().to(device) if config.gan_weight > 0 and trains_pixels else None

    def compile(self) -> None:
        """Compile the networks of the objective with torch.compile, in place."""
        for network in filter(None, (self.teacher, self.lpips, self.discriminator)):
            network.compile()

    def is_active(self, step: int) -> bool:
        """Whether the discriminator is used in a step."""
        return self.discriminator is not None and step >= self._config.gan_start

    @property
    def depths(self) -> tuple[int, ...]:
        """Depths other than `semantic_depth` at which the loss needs the latents."""
        return tuple(self.teacher.extra_depths) if self.teacher is not None else ()

    def terms(
        self, pixel_values: Tensor, output: EvoTokOutput, step: int, heads: nn.Module | None = None
    ) -> dict[str, Tensor]:
        """The weighted terms of the tokenizer's loss for images (B, 3, H, W) in [-1, 1].

        Args:
            output: with the latents at `depths`.
            heads: `heads`, wrapped for several processes.
        """
        assert output.pixels is not None and output.features is not None and output.commitment_loss is not None
        config, pixels = self._config, output.pixels.float()
        distance = F.mse_loss if config.pixel_loss == "l2" else F.l1_loss
        terms: dict[str, Tensor] = {
            "pixel": config.pixel_weight * distance(pixels, pixel_values),
            "commitment": config.commitment_weight * output.commitment_loss,
        }
        if output.codebook_loss is not None:
            terms["codebook"] = output.codebook_loss
        if self.lpips is not None:
            terms["lpips"] = config.lpips_weight * self.lpips(pixels, pixel_values).mean()
        if self.teacher is not None:
            with torch.no_grad():
                targets = self.teacher.targets(pixel_values)
            *others, last = targets
            terms["semantic"] = config.semantic_weight * _distance(output.features, targets[last])
            if others:
                assert output.latents is not None and heads is not None
                for depth, predicted in zip(others, heads(output.latents), strict=True):
                    terms[f"semantic_at_{depth}"] = config.semantic_weight * _distance(predicted, targets[depth])
        if self.discriminator is not None and self.is_active(step):
            terms["gan"] = self._adversarial(self.discriminator, pixels, terms)
        return terms

    def _adversarial(self, discriminator: PatchDiscriminator, pixels: Tensor, terms: dict[str, Tensor]) -> Tensor:
        discriminator.requires_grad_(False)  # this term trains the tokenizer only
        adversarial = generator_loss(discriminator(pixels))
        discriminator.requires_grad_(True)
        if not self._config.gan_adaptive:
            return self._config.gan_weight * adversarial
        reconstruction = terms["pixel"] + terms.get("lpips", 0)
        weight = self._config.gan_weight * adaptive_weight(reconstruction, adversarial, self._last_layer)
        return weight * adversarial

    def discriminator_term(self, discriminator: nn.Module, pixel_values: Tensor, pixels: Tensor) -> Tensor:
        """The loss of the discriminator.

        Args:
            discriminator: the discriminator, wrapped for several processes.
        """
        real, fake = discriminator(torch.cat([pixel_values, pixels.detach().float()])).chunk(2)
        return discriminator_loss(real, fake)


class AlignmentHeads(nn.ModuleDict):
    """Predictions of the teacher's features (B, N, D) from latents (B, N, C) at depths other than `semantic_depth`.

    They are used in training only. Each position is predicted by itself, so that its codes must hold the features.
    """

    def __init__(self, codebook_dim: int, widths: dict[int, int]) -> None:
        super().__init__({str(depth): _mlp(codebook_dim, width) for depth, width in widths.items()})

    def forward(self, latents: Sequence[Tensor]) -> list[Tensor]:
        """Features by depth, in the order of the depths."""
        return [head(one) for head, one in zip(self.values(), latents, strict=True)]


def _mlp(codebook_dim: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(codebook_dim, width), nn.GELU(), nn.Linear(width, width))


def _distance(features: Tensor, target: Tensor) -> Tensor:
    """Cosine and folded cosine loss of features (B, N, D)."""
    return cosine_loss(features, target) + folded_cosine_loss(features, target)
