"""Classifier-free guidance of logits."""

import pytest
import torch

from evotok_plugin.guidance import guided_logits, scale_at_level


@pytest.fixture
def logits():
    return torch.randn(6, 50, generator=torch.Generator().manual_seed(0)) * 4


@pytest.mark.parametrize("scale", [1.0, torch.tensor(1.0)], ids=["number", "tensor"])
@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
def test_scale_1_gives_the_logits_with_the_prompt_exactly(logits, scale, rescale):
    assert torch.equal(guided_logits(logits, scale, rescale), logits[:3])


@pytest.mark.parametrize("rescale", [0.0, 0.3, 1.0])
def test_rescaling_mixes_in_the_standard_deviation_of_the_logits_with_the_prompt(logits, rescale):
    guided = guided_logits(logits, 3.0, rescale)
    for row in range(3):
        plain = logits[3 + row] + 3 * (logits[row] - logits[3 + row])
        expected = rescale * plain * (logits[row].std() / plain.std()) + (1 - rescale) * plain
        torch.testing.assert_close(guided[row], expected)
    if rescale == 1:
        torch.testing.assert_close(guided.std(dim=1), logits[:3].std(dim=1))


def test_equal_logits_stay_finite():
    assert torch.equal(guided_logits(torch.zeros(2, 5), 3.0, 1.0), torch.zeros(1, 5))


def test_one_scale_is_that_of_all_levels():
    assert scale_at_level(2.0, 3) == scale_at_level(torch.tensor(2.0), 3) == scale_at_level(torch.tensor([2.0]), 3) == 2
    assert scale_at_level((1.0, 2.0), 1) == scale_at_level(torch.tensor([1.0, 2.0]), 1) == 2
