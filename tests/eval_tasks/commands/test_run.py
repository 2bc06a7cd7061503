"""`evotok-eval run`: one lmms-eval run per task; finished tasks are skipped, failed tasks are reported at the end."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eval_tasks import cli
from eval_tasks.commands import run as command

ROOT = Path(__file__).resolve().parents[3]

# Replaces lmms-eval: records its call, then writes results, or fails like lmms-eval (with exit code 0).
STAND_IN = """
import json, os, sys, time
from pathlib import Path
task, folder, what = sys.argv[1:]
with open("ran.txt", "a") as notes:
    notes.write(f"{task} {os.getpid()}\\n")
if what == "hang":
    time.sleep(3600)
if what != "fail":
    values = {} if what == "empty" else {"acc,none": 0.5}
    content = {"results": {task: values}, "model_name": "m", "n-samples": {task: {"original": 1, "effective": 1}}}
    out = Path(folder) / "m"
    out.mkdir(parents=True, exist_ok=True)
    (out / f"20260101_00000{len(list(out.iterdir()))}_results.json").write_text(json.dumps(content))
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The module of the command, in a working folder with a model and the stand-in for lmms-eval."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text('{"model_type": "evotok_llava"}')
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    before = signal.getsignal(signal.SIGTERM)
    yield command
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def run(module, monkeypatch, tmp_path):
    """`run(*flags, task=outcome)` evaluates tasks with given outcomes; returns the exit code and the tasks that ran."""

    def evaluate(*flags, **tasks):
        def command(self, task):
            return [sys.executable, "stand_in.py", task, str(self.folder(task)), tasks[task]]

        monkeypatch.setattr(module.Evaluation, "command", command)
        notes = tmp_path / "ran.txt"
        notes.unlink(missing_ok=True)
        code = cli.main(["run", "--model", "model", "--output", "out", "--tasks", *tasks, *flags])
        return code, [line.split()[0] for line in notes.read_text().splitlines()] if notes.exists() else []

    return evaluate


def test_a_failed_task_fails_the_command_after_all_others(run, capsys):
    assert run(a="fail", b="well", c="empty", d="well") == (1, ["a", "b", "c", "d"])
    output = capsys.readouterr()
    assert "FAILED a: no lmms-eval results" in output.err and "FAILED c: " in output.err
    assert "no figures for c" in output.err
    assert "[2/4] b: finished" in output.out and "| b: acc | 0.500 |" in output.out


def test_finished_tasks_are_not_run_again(run, capsys):
    assert run(a="well", b="fail") == (1, ["a", "b"])
    assert run(a="well", b="well") == (0, ["b"])
    assert run(c="well") == (0, ["c"])
    table = Path("out/report/report.md").read_text()
    assert all(f"| {task}: acc |" in table for task in "abc")


def test_other_settings_or_weights_start_a_new_evaluation(run, tmp_path, monkeypatch):
    assert run(a="well") == (0, ["a"])
    assert run("--limit", "3", a="well") == (0, ["a"])
    assert run("--limit", "3", a="well") == (0, [])
    assert run("--limit", "3", "--model_args", "seed=1", a="well") == (0, ["a"])
    monkeypatch.setenv("EVOTOK_JUDGE_VQA", "other")
    assert run("--limit", "3", "--model_args", "seed=1", a="well") == (0, ["a"])
    (tmp_path / "model/model.safetensors").write_bytes(b"trained on")
    assert run("--limit", "3", "--model_args", "seed=1", a="well") == (0, ["a"])


def test_results_of_an_earlier_run_do_not_hide_a_failure(run):
    assert run(a="well") == (0, ["a"])
    assert run("--limit", "3", a="fail") == (1, ["a"])


def test_deleted_results_are_recreated(run):
    assert run(a="well") == (0, ["a"])
    for file in Path("out/a/m").iterdir():
        file.unlink()
    assert run(a="well") == (0, ["a"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--model", "nowhere"], "nowhere' does not exist"), (["--model", "model", "--limit", "0"], "at least 1, got 0")],
)
def test_user_errors_are_one_line(module, flags, message, capsys):
    assert cli.main(["run", *flags, "--output", "out"]) == 2
    assert message in capsys.readouterr().err


def parse(flags):
    parser = argparse.ArgumentParser()
    command.add(parser.add_subparsers())
    return parser.parse_args(["run", *flags])


def test_the_command_and_environment_of_lmms_eval(module, tmp_path, monkeypatch):
    monkeypatch.delenv("EVOTOK_RECONSTRUCTION_IMAGES", raising=False)
    flags = ["--model", "model", "--output", "out", "--limit", "5", "--images", "photos", "--model_args", "seed=2"]
    evaluation = module.open_evaluation(parse(flags))
    asked = " ".join(evaluation.command("geneval"))
    assert f"pretrained={tmp_path / 'model'},images_dir={tmp_path / 'out/geneval/images'},seed=2" in asked
    assert "--tasks geneval" in asked and "--limit 5" in asked
    assert "--verbosity WARNING" in asked  # lmms-eval reports each of its steps otherwise
    assert "--limit" not in evaluation.command("evotok_reconstruction")  # counts images, through a variable
    environment = evaluation.environment("evotok_reconstruction")
    assert environment["EVOTOK_RECONSTRUCTION_IMAGES"] == str(tmp_path / "photos")
    assert environment["EVOTOK_RECONSTRUCTION_LIMIT"] == "5"
    monkeypatch.setenv("NPROC", "2")
    assert "torch.distributed.run --standalone --nproc_per_node 2 -m lmms_eval" in " ".join(evaluation.command("x"))


def test_the_understanding_suite_runs_benchmark_by_benchmark(module, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    tasks = module.expand_suite(["geneval", "evotok_understanding", "pope"])
    assert tasks[:2] == ["geneval", "pope"] and "evotok_gqa" in tasks and len(tasks) == 10


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_stopped_command_leaves_no_evaluation_running(module, tmp_path, number, code):
    starter = tmp_path / "start.py"
    starter.write_text(
        "import sys\n"
        "from eval_tasks import cli\n"
        "from eval_tasks.commands import run as module\n"
        "command = lambda self, task: [sys.executable, 'stand_in.py', task, str(self.folder(task)), 'hang']\n"
        "module.Evaluation.command = command\n"
        "sys.exit(cli.main(['run', '--model', 'model', '--output', 'out', '--tasks', 'a']))\n"
    )
    script = subprocess.Popen([sys.executable, str(starter)], cwd=tmp_path, stderr=subprocess.DEVNULL)
    notes = tmp_path / "ran.txt"
    _wait(lambda: notes.exists() and notes.read_text().endswith("\n"), 900)
    script.send_signal(number)
    assert script.wait(timeout=900) == code
    pid = int(notes.read_text().split()[1])
    _wait(lambda: not _is_alive(pid), 900)
    assert not (tmp_path / "out/a/finished.json").exists()


def _figures(output):
    (run,) = json.loads((output / "report/report.json").read_text())["runs"]
    return run["tasks"]["evotok_reconstruction"]["figures"]


def _wait(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def _is_alive(pid: int) -> bool:
    """Whether a process is running; a zombie is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_the_default_tasks_on_a_small_model(tiny_mllm, tmp_path):
    """`bash scripts/evaluate.sh` as a user types it."""
    model, processor = tiny_mllm
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    command = ["bash", str(ROOT / "scripts/evaluate.sh"), "--model", "model", "--limit", "4", "--output", "out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((tmp_path / "out/report/report.json").read_text())
    assert {"PSNR", "SSIM", "code usage", "MMBench scenes", "GenEval scenes"} <= {
        row["name"] for row in content["rows"]
    }
    two = [*command[:-1], "two", "--tasks", "evotok_reconstruction"]
    done = subprocess.run(two, cwd=tmp_path, env=environment | {"NPROC": "2"}, capture_output=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    one, both = (_figures(tmp_path / name) for name in ("out", "two"))
    assert both == pytest.approx(one) and both["num_images"] == 4
    again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1800)
    assert again.returncode == 0 and again.stdout.count("finished before") == 3
