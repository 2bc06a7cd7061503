"""Progress bars on a terminal and in a log file, with a fake clock."""

import io
import os
import subprocess
import sys

import pytest

from evotok_plugin.common import progress
from evotok_plugin.common.progress import progress_bar


class Stream(io.StringIO):
    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal

    def states(self) -> list[str]:
        return [state for state in self.getvalue().replace("\n", "\r").split("\r") if state.strip()]


@pytest.fixture
def clock(monkeypatch):
    """The time that bars see, in seconds."""
    now = [1000.0]
    for module in ("tqdm.std", "evotok_plugin.common.progress"):
        monkeypatch.setattr(f"{module}.time", lambda: now[0])
    return now


def stderr(monkeypatch, is_terminal):
    stream = Stream(is_terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def steps(clock, bar, count, seconds):
    for step in range(count):
        clock[0] += seconds
        bar.update()
        bar.set_postfix(loss=step)


def test_a_log_file_gets_one_state_every_15_seconds_and_the_last(monkeypatch, clock):
    stream = stderr(monkeypatch, is_terminal=False)
    bar = progress_bar(total=778, desc="train", unit="step")
    steps(clock, bar, 778, 1.0)
    bar.close()
    assert 45 <= len(stream.states()) <= 778 // 15 + 1
    assert "778/778" in stream.states()[-1] and "0/778" not in stream.states()[0]


def test_a_short_bar_leaves_only_its_last_state_in_a_log_file(monkeypatch, clock):
    stream = stderr(monkeypatch, is_terminal=False)
    for _ in progress_bar(range(100), unit="image"):
        clock[0] += 0.1
    assert len(stream.states()) == 1 and "100/100" in stream.states()[0]


def test_long_steps_of_a_log_file_are_each_printed(monkeypatch, clock):
    stream = stderr(monkeypatch, is_terminal=False)
    for _ in progress_bar(range(5)):
        clock[0] += 60
    assert [state.split("/")[0].split()[-1] for state in stream.states()] == ["1", "2", "3", "4", "5", "5"]


def test_a_terminal_is_updated_several_times_a_second(monkeypatch, clock):
    stream = stderr(monkeypatch, is_terminal=True)
    bar = progress_bar(total=100)
    assert "0/100" in stream.states()[0]
    steps(clock, bar, 100, 0.05)
    bar.close()
    assert 20 <= len(stream.states()) <= 100 * 0.05 / 0.2 + 2


def test_a_disabled_bar_prints_nothing(monkeypatch, clock):
    stream = stderr(monkeypatch, is_terminal=False)
    bar = progress_bar(total=10, disable=True)
    steps(clock, bar, 10, 20.0)
    assert list(progress_bar(range(3), disable=True)) == [0, 1, 2]
    bar.close()
    assert not stream.getvalue()


def test_the_interval_follows_stderr(monkeypatch):
    stderr(monkeypatch, is_terminal=False)
    assert progress.progress_interval() == 15.0
    stderr(monkeypatch, is_terminal=True)
    assert progress.progress_interval() == 0.2


def test_child_processes_obey_the_interval_in_a_log_file(monkeypatch):
    stderr(monkeypatch, is_terminal=True)
    assert progress.progress_environment() == {}
    stderr(monkeypatch, is_terminal=False)
    code = (
        "import datasets, transformers, tqdm\n"
        "bar = tqdm.tqdm(total=1)\n"
        "print(bar.mininterval, bar.maxinterval, transformers.utils.logging.is_progress_bar_enabled(), "
        "datasets.is_progress_bar_enabled())"
    )
    environment = {**os.environ, **progress.progress_environment()}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["15.0", "15.0", "False", "False"], done.stderr
