"""Hinge losses, the patch discriminator and the adaptive weight against manually computed values."""

import pytest
import torch

from evotok_plugin.losses.adversarial import (
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
)


def test_hinge_losses():
    assert float(discriminator_loss(torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 0.0]))) == pytest.approx(0.375)
    assert float(generator_loss(torch.tensor([1.0, 3.0]))) == -2.0


def test_the_discriminator_gives_a_logit_per_patch():
    assert PatchDiscriminator(channels=8)(torch.zeros(2, 3, 48, 48)).shape[:2] == (2, 1)


def test_the_adaptive_weight_is_the_ratio_of_gradients():
    weight = torch.nn.Parameter(torch.ones(3))
    ratio = adaptive_weight((2 * weight).sum(), (4 * weight).sum(), weight)
    assert float(ratio) == pytest.approx(0.5, rel=1e-3)
