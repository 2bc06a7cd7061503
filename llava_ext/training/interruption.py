"""Ctrl-C and SIGTERM end a run in order: the step is finished and saved, on all processes at the same one."""

import signal
import threading
import time
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

_ONE_REQUEST_S = 3.0  # a launcher and a batch system may each pass on the same request


def on_any_process(flags: list[int], device: torch.device) -> list[int]:
    """The largest value of each flag over all processes."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return flags
    values = torch.tensor(flags, device=device)
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values.tolist()


class StopInOrder(TrainerCallback):
    """Notes SIGINT and SIGTERM while training runs; a second one, later than a moment, ends the process at once.

    Attributes:
        signal: the one that some process has received, as all of them know it after a step; 0 before.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._caught, self._caught_at = 0, 0.0
        self._before: dict[int, Any] = {}

    def _note(self, number: int, frame: object) -> None:
        if not self._caught:
            self._caught, self._caught_at = number, time.monotonic()
        elif time.monotonic() - self._caught_at > _ONE_REQUEST_S:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def on_train_begin(self, args, state, control, **kwargs):
        if threading.current_thread() is threading.main_thread():  # Python hands signals to no other
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note) or signal.SIG_DFL

    def on_step_end(self, args, state, control, **kwargs):
        (self.signal,) = on_any_process([self._caught], args.device)
        if self.signal:
            control.should_log = control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        self._restore()
