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
from evotok_plugin.teacher import load_teacher, teacher_features
from evotok_plugin.training.config import TokenizerTrainingConfig


class TokenizerObjective:
    """The frozen networks that judge reconstructions, and the discriminator that learns to.

    Raises:
        UserError: the teacher or LPIPS cannot be loaded, or the teacher does not fit the model.
    """

    def __init__(self, config: TokenizerTrainingConfig, model: EvoTokModel) -> None:
        self._config, self._last_layer = config, model.pixel_decoder.last_layer
        device = model.device
        self.teacher = load_teacher(config.teacher).to(device) if config.semantic_weight > 0 else None
        if self.teacher is not None:
            self.teacher.check_fits(model.config)
            if config.init_encoder:
                self._start_from_teacher(model)
        self.lpips = load_lpips().to(device) if config.lpips_weight > 0 else None
        self.discriminator = PatchDiscriminator().to(device) if config.gan_weight > 0 else None

    def _start_from_teacher(self, model: EvoTokModel) -> None:
        """The encoder begins as the teacher's own tower, as in the paper."""
        encoder, tower = model.encoder, self.teacher
        needed, there = len(encoder.encoder.layers), len(tower.encoder.layers)
        if there < needed:
            raise UserError(f"the teacher has {there + 1} layers, the encoder needs {needed + 1}")
        encoder.embeddings.load_state_dict(tower.embeddings.state_dict())
        for ours, theirs in zip(encoder.encoder.layers, tower.encoder.layers, strict=False):
            ours.load_state_dict(theirs.state_dict())

    def compile(self) -> None:
        """torch.compile what is there, in place."""
        for network in filter(None, (self.teacher, self.lpips, self.discriminator)):
            network.compile()

    def is_active(self, step: int) -> bool:
        """Whether the discriminator takes part in a step."""
        return self.discriminator is not None and step >= self._config.gan_start

    def terms(self, pixel_values: Tensor, output: EvoTokOutput, step: int) -> dict[str, Tensor]:
        """The weighted terms of the tokenizer's loss for images (B, 3, H, W) in [-1, 1]."""
        config, pixels = self._config, output.pixels.float()
        distance = F.mse_loss if config.pixel_loss == "l2" else F.l1_loss
        terms = {
            "pixel": config.pixel_weight * distance(pixels, pixel_values),
            "commitment": config.commitment_weight * output.commitment_loss,
        }
        if self.lpips is not None:
            terms["lpips"] = config.lpips_weight * self.lpips(pixels, pixel_values).mean()
        if self.teacher is not None:
            target = teacher_features(self.teacher, pixel_values)
            both = cosine_loss(output.features, target) + folded_cosine_loss(output.features, target)
            terms["semantic"] = config.semantic_weight * both
        if self.is_active(step):
            terms["gan"] = self._adversarial(pixels, terms)
        return terms

    def _adversarial(self, pixels: Tensor, terms: dict[str, Tensor]) -> Tensor:
        self.discriminator.requires_grad_(False)  # its gradients are not wanted here
        adversarial = generator_loss(self.discriminator(pixels))
        self.discriminator.requires_grad_(True)
        weight = self._config.gan_weight
        if self._config.gan_adaptive:
            weight = weight * adaptive_weight(terms["pixel"] + terms.get("lpips", 0), adversarial, self._last_layer)
        return weight * adversarial

    def discriminator_term(self, judge: nn.Module, pixel_values: Tensor, pixels: Tensor) -> Tensor:
        """What the discriminator minimizes; `judge` is it, as the optimizer sees it."""
        real, fake = judge(torch.cat([pixel_values, pixels.detach().float()])).chunk(2)
        return discriminator_loss(real, fake)
