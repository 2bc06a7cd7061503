"""Launching: the number of processes, several nodes, and the exit codes of torchrun."""

import os
import subprocess
import sys
import time

import pytest

from evotok_plugin.common import launcher
from evotok_plugin.errors import UserError

TORCHRUN = [sys.executable, "-m", "evotok_plugin.common.torchrun", "--standalone", "--nproc_per_node", "2"]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0,1,3"}, 3),
        ({"CUDA_VISIBLE_DEVICES": ""}, 0),
        ({"CUDA_VISIBLE_DEVICES": "0,-1,2"}, 1),
        ({}, 4),
    ],
)
def test_visible_gpus_are_counted(tmp_path, monkeypatch, environment, expected):
    lister = tmp_path / "nvidia-smi"
    lister.write_text('#!/bin/sh\nfor n in 0 1 2 3; do echo "GPU $n: NVIDIA (UUID: x)"; done\n')
    lister.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert launcher.visible_gpus({"PATH": f"{tmp_path}:/usr/bin:/bin", **environment}) == expected


def test_without_a_driver_there_are_no_gpus(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert launcher.visible_gpus({"PATH": str(tmp_path)}) == 0


def test_one_process_needs_no_torchrun():
    plain = [sys.executable, "-m", "job", "--x", "1"]
    assert launcher.command_for("job", ["--x", "1"], {"CUDA_VISIBLE_DEVICES": ""}) == plain
    assert launcher.command_for("job", ["--x", "1"], {"CUDA_VISIBLE_DEVICES": "0,1", "NPROC": "1"}) == plain


@pytest.mark.parametrize("flags", [["--use_cpu", "true"], ["--use_cpu=True"], ["--x", "1", "--device", "cpu"]])
def test_a_run_on_the_cpu_has_one_process(flags):
    assert launcher.command_for("job", flags, {"CUDA_VISIBLE_DEVICES": "0,1"})[1:3] == ["-m", "job"]


def test_there_is_one_process_per_gpu_unless_nproc_says_otherwise(capsys):
    found = launcher.command_for("job", [], {"CUDA_VISIBLE_DEVICES": "0,1"})
    assert found[1:] == ["-m", "evotok_plugin.common.torchrun", "--standalone", "--nproc_per_node", "2", "-m", "job"]
    assert "starting 2 processes, one per visible GPU (NPROC)" in capsys.readouterr().err
    assert launcher.command_for("job", [], {"CUDA_VISIBLE_DEVICES": "", "NPROC": "3"})[5] == "3"
    assert not capsys.readouterr().err


def test_several_nodes_name_the_first_one():
    nodes = {"CUDA_VISIBLE_DEVICES": "", "NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "host0", "NPROC": "8"}
    found = launcher.command_for("job", ["--x"], nodes)
    assert found[3:] == ["--nnodes", "2", "--node_rank", "1", "--master_addr", "host0", "--master_port", "29500",
                         "--nproc_per_node", "8", "-m", "job", "--x"]  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"NPROC": "two"}, "NPROC: expected a number of at least 1, got 'two'"),
        ({"NPROC": "0"}, "NPROC: expected a number of at least 1, got '0'"),
        ({"NNODES": "2", "MASTER_ADDR": "a"}, "NODE_RANK is not set; set it to this node's number"),
        ({"NNODES": "2", "NODE_RANK": "0"}, "MASTER_ADDR is not set; set it to the first node's address"),
    ],
)
def test_wrong_variables_are_named(environment, message):
    with pytest.raises(UserError, match=message):
        launcher.command_for("job", [], {"CUDA_VISIBLE_DEVICES": "", **environment})


def test_the_launcher_replaces_itself_and_keeps_the_exit_code(tmp_path):
    (tmp_path / "job.py").write_text(
        "import os, sys\nsys.exit(3 if sys.argv[1:] == ['--x'] and 'RANK' in os.environ else 4)\n"
    )
    command = [sys.executable, "-m", "evotok_plugin.common.launcher", "job", "--x"]
    environment = {**os.environ, "NPROC": "2"}
    assert subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True).returncode == 3
    ended = subprocess.run(command, cwd=tmp_path, env={**environment, "NPROC": "x"}, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stderr == "error: NPROC: expected a number of at least 1, got 'x'\n"


def test_torchrun_returns_the_exit_code_of_a_failed_process(tmp_path):
    (tmp_path / "job.py").write_text("import sys\nsys.exit(2)\n")
    ended = subprocess.run([*TORCHRUN, str(tmp_path / "job.py")], capture_output=True, text=True)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr


def test_torchrun_that_is_terminated_returns_the_exit_code_of_its_processes(tmp_path):
    job = "import signal, sys, time, pathlib\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
    (tmp_path / "job.py").write_text(job + f"pathlib.Path({str(tmp_path / 'up')!r}).touch()\ntime.sleep(3600)\n")
    running = subprocess.Popen([*TORCHRUN, str(tmp_path / "job.py")], stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "up").exists():
        assert running.poll() is None
        time.sleep(0.05)
    running.terminate()
    _, errors = running.communicate(timeout=900)
    assert running.returncode == 143 and "Traceback" not in errors
