"""Scripts of the repository, and the scripts and recipes that the README names."""

import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evotok_plugin.common.recipes import recipe_values, recipes_folder
from evotok_plugin.errors import UserError
from llava_ext.training.config import StageConfig

ROOT = Path(__file__).resolve().parents[1]


RECIPES = sorted(recipes_folder("llava_ext").glob("*.yaml"))


TOKENIZER_RECIPES = sorted(recipes_folder("evotok_plugin").glob("*.yaml"))


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").rglob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_valid_bash(script):
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize("method", ["finetune", "finetune_lora", "finetune_qlora"])
def test_every_method_has_a_short_script_and_a_recipe(method):
    lines = (ROOT / "scripts" / f"{method}.sh").read_text().splitlines()
    assert len(lines) < 10 and lines[-1] == f'train_stage {method} "$@"'
    values = recipe_values(method, StageConfig, {})
    assert values.get("lora_enable", False) == (method != "finetune")
    assert values.get("bits", 16) == (4 if method == "finetune_qlora" else 16)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0,1,3"}, "3"),
        ({"CUDA_VISIBLE_DEVICES": ""}, "1"),
        ({"CUDA_VISIBLE_DEVICES": "0,-1,2"}, "1"),
        ({}, "4"),
        ({"PATH": "/usr/bin:/bin"}, "1"),
    ],
)
def test_the_default_number_of_processes_is_that_of_the_visible_gpus(tmp_path, environment, expected):
    lister = tmp_path / "nvidia-smi"
    lister.write_text('#!/bin/sh\nfor n in 0 1 2 3; do echo "GPU $n: NVIDIA (UUID: x)"; done\n')
    lister.chmod(0o755)
    script = (ROOT / "scripts" / "lib" / "environment.sh").read_text().rpartition("use_environment\n")[0]
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", **environment}
    shown = subprocess.run(["bash", "-c", f"set -euo pipefail\n{script}\nvisible_gpus"], env=environment, text=True,
                           capture_output=True, check=True)  # fmt: skip
    assert shown.stdout.strip() == expected


TORCHRUN = [sys.executable, str(ROOT / "scripts" / "lib" / "torchrun.py"), "--standalone", "--nproc_per_node", "2"]


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


def test_the_readme_names_only_scripts_and_recipes_that_exist():
    readme = (ROOT / "README.md").read_text()
    words = {word.strip("`,.;:()") for word in readme.split()}
    for word in words:
        if word.startswith("scripts/") and word.endswith(".sh"):
            assert (ROOT / word).is_file(), word
    for first, second in zip(readme.split(), readme.split()[1:], strict=False):
        if first == "--recipe" and second.isidentifier():
            assert second in {path.stem for path in [*RECIPES, *TOKENIZER_RECIPES]}, second
    for line in readme.splitlines():
        if line.startswith("![") and "](docs/" in line:
            assert (ROOT / line.split("](")[1].rstrip(")")).is_file(), line


@pytest.mark.parametrize(
    "content", ["", "[" * 100_000, '{"fast": false}', '{"fast": false, "seconds": 3}', '{"seconds": {"prepare": "x"}}']
)
def test_a_damaged_record_of_the_quickstart_is_named(tmp_path, monkeypatch, content):
    quickstart = runpy.run_path(str(ROOT / "scripts" / "quickstart.py"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / quickstart["WORKSPACE"]).mkdir(parents=True)
    (tmp_path / quickstart["WORKSPACE"] / "run.json").write_text(content)
    with pytest.raises(UserError, match="run.json is damaged or missing .* delete it to start a new run"):
        quickstart["Quickstart"](quickstart["Settings"]())
    with pytest.raises(UserError, match="scenes/done.json is damaged or missing"):
        quickstart["prepared_seconds"](quickstart["WORKSPACE"])
