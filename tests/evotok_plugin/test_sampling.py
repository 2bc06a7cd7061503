"""Sampling of codes against a naive implementation in numpy."""

import numpy as np
import pytest
import torch

from evotok_plugin import SamplingOptions, uniform_noise
from evotok_plugin.errors import UserError
from evotok_plugin.sampling import sample


def filtered(logits: np.ndarray, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> np.ndarray:
    """Apply the filters one by one to the sorted probabilities; returns the distribution (K,) to draw from."""
    order = np.argsort(-logits, kind="stable")
    scaled = logits[order] / temperature
    probability = np.exp(scaled - scaled.max())
    if top_k:
        probability[top_k:] = 0
    probability /= probability.sum()
    before = np.cumsum(probability) - probability
    probability[before >= top_p] = 0
    probability[probability < min_p * probability.max()] = 0
    result = np.zeros_like(probability)
    result[order] = probability / probability.sum()
    return result


FILTERS = [
    {},
    {"temperature": 0.6},
    {"top_k": 5},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"top_k": 9, "top_p": 0.8, "min_p": 0.05, "temperature": 1.3},
]


@pytest.mark.parametrize("filters", FILTERS)
def test_draws_follow_the_filtered_distribution(filters):
    logits = torch.randn(30, generator=torch.Generator().manual_seed(0)) * 2
    noise = (torch.arange(20000) + 0.5) / 20000  # evenly spaced quantiles
    drawn = sample(logits.expand(20000, -1), SamplingOptions(**filters), noise)
    found = torch.bincount(drawn, minlength=30) / 20000
    expected = filtered(logits.double().numpy(), **filters)
    np.testing.assert_allclose(found, expected, atol=2e-4)
    assert not found[torch.from_numpy(expected == 0)].any()


def test_temperature_zero_takes_the_likeliest():
    logits = torch.randn(6, 40)
    assert torch.equal(sample(logits, SamplingOptions(temperature=0), torch.rand(6)), logits.argmax(-1))


@pytest.mark.parametrize("filters", FILTERS)
def test_extreme_noise_draws_codes_that_pass_the_filters(filters):
    logits = torch.randn(50, 33) * 5
    for edge in (0.0, 1 - 2**-24):
        drawn = sample(logits, SamplingOptions(**filters), torch.full((50,), edge))
        for row, code in enumerate(drawn.tolist()):
            assert 0 <= code < 33 and filtered(logits[row].double().numpy(), **filters)[code] > 0


def test_top_p_of_a_flat_distribution_needs_more_codes_than_are_sorted_first():
    logits, size = torch.zeros(3, 8000), 8000
    drawn = sample(logits, SamplingOptions(top_p=0.9), torch.tensor([0.0, 0.5, 0.999]))
    assert len(set(drawn.tolist())) == 3 and max(drawn.tolist()) < size


@pytest.mark.parametrize("filters", FILTERS)
def test_a_row_does_not_depend_on_other_rows(filters):
    logits, noise = torch.randn(8, 4000) * torch.arange(8)[:, None], torch.rand(8)
    together = sample(logits, SamplingOptions(**filters), noise)
    alone = [sample(logits[i : i + 1], SamplingOptions(**filters), noise[i : i + 1]) for i in range(8)]
    assert torch.equal(together, torch.cat(alone))


def test_every_level_may_have_its_own_value():
    options = SamplingOptions(temperature=[0.0, 1.0], top_k=(3, 0), top_p=0.5)
    assert options.at_level(0) == SamplingOptions(0.0, 3, 0.5)
    assert options.at_level(1) == SamplingOptions(1.0, 0, 0.5)
    options.check_levels(2)
    with pytest.raises(TypeError, match="call SamplingOptions.at_level first"):
        sample(torch.zeros(1, 4), options, torch.zeros(1))
    with pytest.raises(UserError, match="temperature has 2 values, but 4 levels are drawn"):
        options.check_levels(4)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"temperature": -1}, "expected temperature 0, or 0.001 to 1000, got temperature=-1"),
        ({"temperature": 1e-40}, "temperature=1e-40"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"top_k": float("inf")}, "top_k=inf"),
        ({"top_k": 2.5}, "a whole top_k"),
        ({"top_p": 0.0}, "0 < top_p <= 1"),
        ({"top_p": [1.0, 1.5]}, "0 < top_p <= 1"),
        ({"min_p": 2}, "0 <= min_p <= 1"),
        ({"min_p": []}, "min_p"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
    ],
)
def test_impossible_values_are_rejected(value, message):
    with pytest.raises(UserError, match=message):
        SamplingOptions(**value)


def test_logits_that_are_not_finite_give_a_valid_code():
    for value in (float("nan"), float("inf"), -float("inf"), 3e38):
        logits = torch.zeros(2, 7)
        logits[:, 3] = value
        for filters in FILTERS:
            drawn = sample(logits, SamplingOptions(**filters), torch.tensor([0.0, 0.99]))
            assert 0 <= drawn.min() and drawn.max() < 7


def test_numpy_scalars_are_accepted():
    assert SamplingOptions(temperature=np.float32(0.5), top_k=np.int64(3)) == SamplingOptions(0.5, 3)


def test_noise_depends_only_on_its_seed():
    torch.manual_seed(1)
    first = uniform_noise(7, 3, 4)
    torch.manual_seed(2)
    assert torch.equal(first, uniform_noise(7, 3, 4)) and not torch.equal(first, uniform_noise(8, 3, 4))
