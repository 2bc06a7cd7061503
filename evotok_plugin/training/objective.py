"""The tokenizer's loss, by name: pixels, LPIPS, PatchGAN, commitment, and the two cosines to the teacher."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evotok_plugin.errors import UserError
from evotok_plugin.losses.adversarial import (
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
)
from evotok_plugin.losses.perceptual import load_lpips
from evotok_plugin.losses.semantic import cosine_loss, folded_cosine_loss
from evotok_plugin.modeling_evotok import EvoTokModel, EvoTokOutput
from evotok_plugin.teacher import Teacher, load_teacher, teacher_features
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
        if config.semantic_weight > 0:
            assert config.teacher is not None  # TokenizerTrainingConfig has checked it
            self.teacher = load_teacher(config.teacher).to(device)
            self.teacher.check_fits(model.config)
            if config.init_encoder:
                _init_encoder(model, self.teacher)
        self.lpips = load_lpips().to(device) if config.lpips_weight > 0 else None
        self.discriminator = PatchDiscriminator().to(device) if config.gan_weight > 0 else None

    def compile(self) -> None:
        """Compile the networks of the objective with torch.compile, in place."""
        for network in filter(None, (self.teacher, self.lpips, self.discriminator)):
            network.compile()

    def is_active(self, step: int) -> bool:
        """Whether the discriminator is used in a step."""
        return self.discriminator is not None and step >= self._config.gan_start

    def terms(self, pixel_values: Tensor, output: EvoTokOutput, step: int) -> dict[str, Tensor]:
        """The weighted terms of the tokenizer's loss for images (B, 3, H, W) in [-1, 1]."""
        assert output.pixels is not None and output.features is not None and output.commitment_loss is not None
        config, pixels = self._config, output.pixels.float()
        distance = F.mse_loss if config.pixel_loss == "l2" else F.l1_loss
        terms: dict[str, Tensor] = {
            "pixel": config.pixel_weight * distance(pixels, pixel_values),
            "commitment": config.commitment_weight * output.commitment_loss,
        }
        if self.lpips is not None:
            terms["lpips"] = config.lpips_weight * self.lpips(pixels, pixel_values).mean()
        if self.teacher is not None:
            target = teacher_features(self.teacher, pixel_values)
            both = cosine_loss(output.features, target) + folded_cosine_loss(output.features, target)
            terms["semantic"] = config.semantic_weight * both
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


def _init_encoder(model: EvoTokModel, teacher: Teacher) -> None:
    """Initialize the encoder from the teacher's tower, as in the paper."""
    needed, available = len(model.encoder.encoder.layers), len(teacher.encoder.layers)
    if available < needed:
        raise UserError(f"the teacher has {available + 1} layers, the encoder needs {needed + 1}")
    model.encoder.embeddings.load_state_dict(teacher.embeddings.state_dict())
    for ours, theirs in zip(model.encoder.encoder.layers, teacher.encoder.layers, strict=False):
        ours.load_state_dict(theirs.state_dict())
