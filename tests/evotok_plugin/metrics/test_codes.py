"""Code usage and perplexity against manually computed values."""

import numpy as np
import pytest
import torch

from evotok_plugin.metrics.codes import CodeUsage


def test_usage_and_perplexity_of_an_even_and_of_a_constant_level():
    usage = CodeUsage(num_levels=2, codebook_size=8)
    for _ in range(2):
        usage.update(torch.stack([torch.arange(8), torch.zeros(8, dtype=torch.long)], -1)[None])
    assert usage.usage() == [1.0, 0.125]
    np.testing.assert_allclose(usage.perplexity(), [8.0, 1.0], rtol=1e-6)


def test_prefixes_of_the_levels_are_counted_and_invalid_codes_rejected():
    usage = CodeUsage(num_levels=3, codebook_size=4)
    usage.update(torch.tensor([[[0, 1, 2], [0, 3, 2]]]))
    usage.update(torch.tensor([[1], [1]], dtype=torch.uint8))
    assert usage.counts.tolist() == [[2, 2, 0, 0], [0, 1, 0, 1], [0, 0, 2, 0]]
    np.testing.assert_allclose(usage.perplexity(), [2, 2, 1])
    with pytest.raises(ValueError, match="4 levels, but only 3 are counted"):
        usage.update(torch.zeros(1, 2, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"0..3, got 0..4"):
        usage.update(torch.tensor([[0, 4, 0]]))
