"""Ctrl-C ends every command with one line and exit code 130."""

import os
import signal
import subprocess
import sys

import pytest

from evotok_plugin.cli import main
from evotok_plugin.commands import convert, encode, evaluate, evolve, reconstruct
from evotok_plugin.training.trainer import TokenizerTrainer


def interrupt(*arguments, **options):
    """Send the signal of Ctrl-C to this process; Python raises KeyboardInterrupt here."""
    signal.raise_signal(signal.SIGINT)


@pytest.fixture(autouse=True)
def handler():
    """Python's own handler: a suite that runs in the background of a shell inherits an ignored SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("arguments", "place", "name"),
    [
        (["evaluate", "images", "--device", "cpu"], evaluate, "open_tokenizer"),
        (["encode", "images", "-o", "{out}", "--device", "cpu"], encode, "open_sources"),
        (["encode", "-o", "{out}", "--verify", "--device", "cpu"], encode, "CodeCache"),
        (["reconstruct", "image.png", "-o", "{out}.png"], reconstruct, "open_tokenizer"),
        (["evolve", "images", "-o", "{out}"], evolve, "open_tokenizer"),
        (["convert", "checkpoint.pt", "{out}"], convert, "convert_checkpoint"),
        (
            ["train", "--recipe", "tiny", "--data", "x", "--output_dir", "{out}", "--semantic_weight", "0"],
            TokenizerTrainer,
            "open",
        ),
    ],
)
def test_ctrl_c_ends_a_command_with_one_line(monkeypatch, capsys, tmp_path, arguments, place, name):
    monkeypatch.setattr(place, name, interrupt)
    assert main([argument.format(out=tmp_path / "out") for argument in arguments]) == 130
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1] == "stopped" and "Traceback" not in captured.err and not captured.out
    assert not (tmp_path / "out").exists()


INTERRUPTED_COMMAND = """
import os, signal, sys, time
from evotok_plugin import cli
from evotok_plugin.commands import evaluate

def interrupt(*arguments):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)

signal.signal(signal.SIGINT, signal.default_int_handler)
evaluate.open_tokenizer = interrupt
sys.exit(cli.main(["evaluate", "images", "--device", "cpu"]))
"""


def test_the_process_of_an_interrupted_command_exits_with_130():
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_COMMAND], capture_output=True, text=True, timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 130 and done.stderr.splitlines()[-1] == "stopped" and "Traceback" not in done.stderr
