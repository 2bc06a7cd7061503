"""An exponential moving average of a model's weights."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from evotok_plugin.errors import UserError


class WeightsEMA:
    """Averaged float32 copies of the parameters.

    Codebooks are buffers and are not averaged: they are moving averages already. The decay rises as
    (1 + step) / (10 + step), so that early averages do not depend on the initial weights.

    `torch.optim.swa_utils.AveragedModel` copies the weights at its first update instead of averaging them, and its
    state has other names and includes the buffers, so it would change results and checkpoints.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._model, self._decay = model, decay
        self._averages = {name: value.detach().float().clone() for name, value in model.named_parameters()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the weights after `step` steps to the average."""
        decay = min(self._decay, (1 + step) / (10 + step))
        current = [value.detach().float() for _, value in self._model.named_parameters()]
        torch._foreach_lerp_(list(self._averages.values()), current, 1 - decay)

    @contextlib.contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """Context in which the model has the averaged weights."""
        parameters = dict(self._model.named_parameters())
        original = {name: value.detach().clone() for name, value in parameters.items()}
        for name, value in parameters.items():
            value.copy_(self._averages[name])
        try:
            yield
        finally:
            for name, value in parameters.items():
                value.copy_(original[name])

    def state_dict(self) -> dict[str, Tensor]:
        """The averages under the names of the parameters."""
        return dict(self._averages)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore averages that `state_dict` returned.

        Raises:
            UserError: the names are those of another model.
        """
        if state.keys() != self._averages.keys():
            raise UserError("the averaged weights are those of another model")
        for name, value in state.items():
            self._averages[name].copy_(value)
