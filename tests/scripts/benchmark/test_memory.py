"""The benchmark of memory: peaks of processes, failures, and the limit."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from evotok_plugin.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").is_file(), reason="needs Linux")


@pytest.fixture
def memory(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts/benchmark"))
    return importlib.import_module("memory")


def test_memory_of_child_processes_counts(memory, tmp_path):
    grow = "import time; data = b'1' * (200 << 20); time.sleep(1.5)"
    start = f"[subprocess.Popen([sys.executable, '-c', {grow!r}]) for _ in range(2)]"
    code = f"import subprocess, sys; [process.wait() for process in {start}]"
    peak = memory.peak_of([sys.executable, "-c", code], tmp_path, tmp_path / "log")
    assert peak.together > 390 << 20
    # This process is large, and its children begin with its size.
    assert peak.largest > 200 << 20 and peak.together >= peak.largest


def test_a_stage_that_fails_is_an_error(memory, tmp_path):
    with pytest.raises(UserError, match="exit code 3.*no luck"):
        memory.peak_of([sys.executable, "-c", "import sys; print('no luck'); sys.exit(3)"], tmp_path, tmp_path / "log")


def run(memory, monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["memory.py", *map(str, flags)])
    return memory.main()


def test_stages_are_measured_and_the_limit_is_checked(memory, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "_REQUESTS", 1)
    flags = [
        "--fast",
        "--stages",
        "scenes",
        "draw",
        "serve",
        "--workspace",
        tmp_path / "w",
        "--json",
        tmp_path / "m.json",
        "--limit",
        24,  # children begin with the size of this process, which may run the whole test suite
    ]
    assert run(memory, monkeypatch, *flags) == 0
    result = json.loads((tmp_path / "m.json").read_text())
    rows = result["tables"]["memory-fast"]["rows"]
    assert [row[0] for row in rows] == ["scenes", "draw", "serve"]
    assert all(0 < float(row[1]) <= float(row[2]) < 24 for row in rows)
    assert list((tmp_path / "w/drawn").glob("*.png"))
    assert run(memory, monkeypatch, "--stages", "scenes", "--workspace", tmp_path / "w", "--limit", 0.01) == 1
    assert "above 0.01 GiB: scenes" in capsys.readouterr().err


def test_the_table_of_stages_is_complete(memory, tmp_path):
    import argparse

    options = argparse.Namespace(steps=1, fast=True, eval_limit=1, model="m")
    assert tuple(memory.stages(tmp_path, options)) == memory.STAGES
