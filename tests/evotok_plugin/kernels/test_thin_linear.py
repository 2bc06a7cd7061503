"""Linear layers over few rows against the layer itself."""

import pytest
import torch
from torch import nn

from evotok_plugin.kernels.thin_linear import thin_linear


@torch.no_grad()
@pytest.mark.parametrize("shape", [(1, 70), (2, 70), (5, 1, 70), (2, 3, 70)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_result_equals_that_of_the_layer(shape, bias):
    layer, x = nn.Linear(70, 130, bias=bias), torch.randn(*shape)
    torch.testing.assert_close(thin_linear(layer, x), layer(x), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_rows_that_are_not_contiguous():
    layer, x = nn.Linear(8, 16), torch.randn(8, 6).T
    torch.testing.assert_close(thin_linear(layer, x), layer(x))


@torch.no_grad()
def test_changes_of_the_weight_take_effect():
    layer, x = nn.Linear(8, 16), torch.randn(2, 8)
    thin_linear(layer, x)
    layer.weight.mul_(2)
    torch.testing.assert_close(thin_linear(layer, x), layer(x))


def test_the_layer_itself_is_called_with_gradients():
    layer = nn.Linear(8, 16)
    thin_linear(layer, torch.randn(2, 8)).sum().backward()
    assert layer.weight.grad is not None


@torch.no_grad()
def test_the_layer_itself_is_called_in_half_precision_and_for_subclasses():
    half = nn.Linear(8, 16).bfloat16()
    assert thin_linear(half, torch.randn(2, 8).bfloat16()).dtype == torch.bfloat16

    class Twice(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    twice, x = Twice(8, 16), torch.randn(2, 8)
    assert torch.equal(thin_linear(twice, x), twice(x))
