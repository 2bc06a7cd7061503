"""measure.sh: the selection of benchmarks, and its end when some of them fail."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
# In place of python: writes the flags as the result. `serving` fails after it has written.
PYTHON = """#!/bin/bash
while [ "$1" != --json ] && [ $# -gt 0 ]; do flags="$flags $1"; shift; done
echo "$flags" >> calls
[ -z "$2" ] || echo "$flags" > "$2"
[[ "$flags" != *serving* ]]
"""


@pytest.fixture
def measure(tmp_path):
    """`measure(*words)` runs a copy of measure.sh, with another `python`; returns the finished process."""
    (tmp_path / "scripts/benchmark/results").mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").write_text(PYTHON)
    (tmp_path / "bin/python").chmod(0o755)
    script = shutil.copy(ROOT / "scripts/benchmark/measure.sh", tmp_path / "scripts/benchmark")
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}

    def run(*words):
        command = ["bash", str(script), *map(str, words)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)

    return run


def results(tmp_path):
    return {file.stem: file.read_text().strip() for file in (tmp_path / "scripts/benchmark/results").glob("*.json")}


def test_every_step_is_a_benchmark_and_runs_unless_one_fails(measure, tmp_path):
    (tmp_path / "scripts/benchmark/results/serving.json").write_text("earlier")
    finished = measure()
    assert finished.returncode == 1 and finished.stderr.endswith("failed: serving\n")
    found = results(tmp_path)
    assert found.pop("serving") == "earlier"
    assert {"text_1", "text_2", "encoding", "memory_fast"} <= set(found)
    assert all((ROOT / call.split()[0]).is_file() for call in found.values())
    assert (tmp_path / "calls").read_text().splitlines()[-1] == " scripts/benchmark/collect.py --write"


def test_some_benchmarks_are_selected_by_result_or_script(measure, tmp_path):
    (tmp_path / "photos").mkdir()
    assert measure("--only", "text", "linear_layers_2", "encoding_base", tmp_path / "photos").returncode == 0
    found = results(tmp_path)
    assert sorted(found) == ["encoding_base", "linear_layers_2", "text_1", "text_2"]
    assert found["encoding_base"].endswith(f"--sizes base --images {tmp_path / 'photos'}")
    assert found["text_1"] == "scripts/benchmark/text.py --threads 1"


@pytest.mark.parametrize("words", [["--only"], ["--only", "texts"], ["text"]])
def test_unknown_names_are_errors(measure, tmp_path, words):
    finished = measure(*words)
    assert finished.returncode == 2 and "linear_layers_1" in finished.stderr
    assert not (tmp_path / "calls").exists()
