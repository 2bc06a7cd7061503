"""Callbacks of Trainer: a progress bar, a metrics file, and a clean stop on Ctrl-C, SIGTERM or SIGHUP."""

from collections.abc import Iterable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback

from evotok_plugin.common.interruption import StopSignals
from evotok_plugin.common.processes import Processes
from evotok_plugin.common.progress import progress_bar
from evotok_plugin.training.metrics_file import append_metrics

LOSSES = ("loss", "text_loss", "image_loss")


class ProgressBar(TrainerCallback):
    """A bar with the steps, the speed, the time left and the latest losses, on the first process.

    Where stderr is not a terminal, it prints at most one state per `progress_interval()`, and the last one at the end.

    Args:
        metrics: names of the logged numbers that it shows.
    """

    def __init__(self, metrics: Sequence[str] = LOSSES) -> None:
        self._bar: tqdm | None = None
        self._metrics = metrics

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and not args.disable_tqdm:
            self._bar = progress_bar(total=state.max_steps, initial=state.global_step, unit="step")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._bar is not None and logs:
            shown = {name: f"{logs[name]:.4f}" for name in self._metrics if name in logs}
            if shown:
                self._bar.set_postfix(shown, refresh=False)  # shown with the next step that is printed

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def open_event_file(callbacks: Iterable[TrainerCallback], args: TrainingArguments, resumed_at: int) -> None:
    """Give TensorBoard's callback a writer that hides what a killed run reported after the step that is resumed.

    Args:
        resumed_at: the step of the checkpoint; 0 for a run from the start.
    """
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and args.should_log and callback.tb_writer is None:
            library = "torch.utils.tensorboard" if find_spec("tensorboard") else "tensorboardX"
            writer = import_module(library).SummaryWriter
            callback.tb_writer = writer(callback.logging_dir, purge_step=resumed_at + 1)


class MetricsFile(TrainerCallback):
    """Appends every log entry to `metrics.jsonl` in the output folder, with step and time."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and logs:
            assert args.output_dir is not None
            append_metrics(Path(args.output_dir), state.global_step, logs)


def on_any_process(flags: Sequence[int], processes: Processes) -> list[int]:
    """The largest value of each flag over all processes."""
    if processes.world_size == 1:
        return list(flags)
    values = torch.zeros(processes.world_size, len(flags), dtype=torch.int64, device=processes.device)
    values[processes.rank] = torch.tensor(flags)
    return processes.add_up(values).amax(dim=0).tolist()


class StopOnSignal(TrainerCallback):
    """Saves a checkpoint and stops training after the step during which a signal arrives at any process.

    Attributes:
        signal: the signal, on all processes from the end of that step on; 0 before.
    """

    def __init__(self, processes: Processes) -> None:
        self.signal = 0
        self._processes, self._signals = processes, StopSignals()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._signals.begin()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        (self.signal,) = on_any_process([self._signals.caught], self._processes)
        if self.signal:
            control.should_log = control.should_save = control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._signals.end()
