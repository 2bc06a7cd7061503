"""Callbacks of the trainer: the progress bar, the metrics file, and stopping on a signal."""

import io
import json
import signal
import sys

import pytest
import torch
from stage_runs import run_forked
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback

from evotok_plugin.common import interruption
from evotok_plugin.common.processes import Processes
from evotok_plugin.errors import UserError
from llava_ext.training.callbacks import MetricsFile, ProgressBar, StopOnSignal, on_any_process, open_event_file

ALONE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture
def training(tmp_path):
    """Arguments, state and control of a run on the first process."""
    arguments = TrainingArguments(output_dir=str(tmp_path), disable_tqdm=False, use_cpu=True, report_to="none")
    return arguments, TrainerState(max_steps=200, is_world_process_zero=True), TrainerControl()


def test_a_progress_bar_in_a_log_file_of_seconds_prints_only_its_last_state(training, monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    bar, (_, state, _) = ProgressBar(), training
    bar.on_train_begin(*training)
    for state.global_step in range(1, 201):
        bar.on_step_end(*training)
        bar.on_log(*training, logs={"loss": 1.0, "learning_rate": 1e-3})
    bar.on_train_end(*training)
    states = [text for text in log.getvalue().replace("\n", "\r").split("\r") if text.strip()]
    assert len(states) == 1 and "200/200" in states[0] and "loss=1.0000" in states[0]


def test_log_entries_are_appended_with_step_and_time(training, tmp_path):
    for step in (1, 2):
        training[1].global_step = step
        MetricsFile().on_log(*training, logs={"loss": 0.5})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 0.5), (2, 0.5)] and "time" in lines[0]


def test_tensorboard_shows_no_step_twice_after_a_kill(training, tmp_path, monkeypatch):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path))
    arguments, state, control = training
    for resumed_at, steps in ((0, (1, 2, 3, 4)), (2, (3, 4, 5))):
        callback = TensorBoardCallback()
        open_event_file([MetricsFile(), callback], arguments, resumed_at)
        callback.on_train_begin(arguments, state, control)
        for state.global_step in steps:
            callback.on_log(arguments, state, control, logs={"loss": resumed_at + state.global_step})
        callback.on_train_end(arguments, state, control)
    events = accumulators.EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1), (2, 2), (3, 5), (4, 6), (5, 7)]


def test_a_metrics_file_that_cannot_be_written_is_named(training, tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match="metrics.jsonl cannot be written: Is a directory"):
        MetricsFile().on_log(*training, logs={"loss": 0.5})


def test_the_largest_flag_of_all_processes_is_found_by_all():
    assert on_any_process([2, 0], ALONE) == [2, 0]
    assert run_forked(_flags_of_two, world_size=2) == [15, 3]


def _flags_of_two():
    processes = Processes.join("cpu")
    found = on_any_process([[2, 3], [15, 0]][processes.rank], processes)
    assert processes.gather(found) == [found, found]
    return found


def test_a_second_ctrl_c_ends_at_once_and_one_sent_twice_does_not(monkeypatch):
    now, stop = [0.0], StopOnSignal(ALONE)
    monkeypatch.setattr(interruption, "_clock", lambda: now[0])
    stop.on_train_begin(None, None, None)
    try:
        signal.raise_signal(signal.SIGINT)
        now[0] = 2.9
        signal.raise_signal(signal.SIGINT)  # a launcher passes on what the terminal has sent already
        now[0] = 3.1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        stop.on_train_end(None, None, None)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
