"""A layer whose activations can be recomputed in the backward pass, as transformers' own layers can."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class CheckpointedLayer(nn.Module):
    """Base of layers with the method `compute`: one tensor in, one of the same shape out.

    transformers' `gradient_checkpointing_enable` sets both attributes on every module that has the first one.
    """

    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., Any]

    def forward(self, x: Tensor) -> Tensor:
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(self.compute, x)
        return self.compute(x)

    def compute(self, x: Tensor) -> Tensor:
        """The layer itself."""
        raise NotImplementedError
