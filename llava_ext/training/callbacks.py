"""Callbacks of the trainer: progress, metrics file, stopping on a signal."""

import json
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import TrainerCallback

from evotok_plugin.common.interruption import StopSignals
from evotok_plugin.common.progress import progress_bar


class ProgressBar(TrainerCallback):
    """One bar: steps, speed, time left, the newest losses."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero and not args.disable_tqdm:
            self._bar = progress_bar(total=state.max_steps, initial=state.global_step, unit="step")

    def on_step_end(self, args, state, control, **kwargs):
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self._bar is not None and logs:
            shown = {k: f"{logs[k]:.4f}" for k in ("loss", "text_loss", "image_loss") if k in logs}
            if shown:
                self._bar.set_postfix(shown)

    def on_train_end(self, args, state, control, **kwargs):
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class MetricsFile(TrainerCallback):
    """Appends every log entry to `metrics.jsonl` in the output folder, with step and time."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs:
            line = {"step": state.global_step, "time": round(time.time(), 2), **logs}
            with (Path(args.output_dir) / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")


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
