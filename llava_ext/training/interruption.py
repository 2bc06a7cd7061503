"""Safe stop on Ctrl-C and SIGTERM: all processes finish and save the same step."""

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from evotok_plugin.common.interruption import StopSignals


def on_any_process(flags: list[int], device: torch.device) -> list[int]:
    """The largest value of each flag over all processes."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return flags
    values = torch.tensor(flags, device=device)
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values.tolist()


class StopSafely(TrainerCallback):
    """Stops training after the step in which SIGINT or SIGTERM arrives.

    Attributes:
        signal: the one that some process has received, as all of them know it after a step; 0 before.
    """

    def __init__(self) -> None:
        self.signal, self._signals = 0, StopSignals()

    def on_train_begin(self, args, state, control, **kwargs):
        self._signals.begin()

    def on_step_end(self, args, state, control, **kwargs):
        (self.signal,) = on_any_process([self._signals.caught], args.device)
        if self.signal:
            control.should_log = control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        self._signals.end()
