"""Semantic alignment losses on vectors whose cosines are known."""

import pytest
import torch

from evotok_plugin.errors import UserError
from evotok_plugin.losses.semantic import cosine_loss, folded_cosine_loss


def test_cosine_loss_ignores_length_and_measures_direction():
    target = torch.randn(5, 8)
    assert float(cosine_loss(3 * target, target)) == pytest.approx(0, abs=1e-6)
    assert float(cosine_loss(-target, target)) == pytest.approx(2, abs=1e-6)


def test_folded_cosine_loss_averages_over_the_parts():
    target = torch.randn(5, 8)
    parts = target.clone()
    parts[:, :2] *= -1  # the first of four parts points in the opposite direction
    assert float(folded_cosine_loss(parts, target)) == pytest.approx(0.5, abs=1e-6)
    with pytest.raises(UserError, match="4 equal parts, but the teacher's width 6"):
        folded_cosine_loss(target[:, :6], target[:, :6])
