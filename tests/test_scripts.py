"""Scripts of the repository, and the scripts and recipes that the README names."""

import os
import runpy
import subprocess
import sys
import venv
from importlib.metadata import PackageNotFoundError
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


@pytest.mark.parametrize("stage", ["pretrain", "finetune", "finetune_lora", "finetune_qlora", "reinforce"])
def test_every_stage_has_a_short_script_and_a_recipe(stage):
    lines = (ROOT / "scripts" / f"{stage}.sh").read_text().splitlines()
    assert len(lines) < 10 and lines[-1] == f'exec python -m llava_ext.cli {stage.replace("_", "-")} "$@"'
    if stage.startswith("finetune"):
        values = recipe_values(stage, StageConfig, {})
        assert values.get("lora_enable", False) == (stage != "finetune")
        assert values.get("bits", 16) == (4 if stage == "finetune_qlora" else 16)


def active(folder: Path) -> dict[str, str]:
    """The environment variables of a user who has activated a virtual environment."""
    kept = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "CONDA_PREFIX")}
    return {**kept, "VIRTUAL_ENV": str(folder), "PATH": f"{folder}/bin:{os.environ['PATH']}"}


def test_a_script_never_installs_into_an_active_environment(tmp_path):
    venv.create(tmp_path / "own", with_pip=False)
    before = sorted((tmp_path / "own").rglob("*"))
    command = ["bash", str(ROOT / "scripts" / "pretrain.sh"), "--help"]
    ended = subprocess.run(command, env=active(tmp_path / "own"), capture_output=True, text=True)
    assert ended.returncode == 2 and not ended.stdout
    first, install, _ = ended.stderr.splitlines()
    assert first.startswith(f"error: the active environment {tmp_path / 'own'} lacks evotok")
    assert install.split() == ["python", "-m", "pip", "install", "-c", f"'{ROOT}/constraints.txt'", "-e",
                               f"'{ROOT}[train]'"]  # fmt: skip
    assert sorted((tmp_path / "own").rglob("*")) == before


def test_another_checkout_is_not_taken_for_this_one(tmp_path):
    (tmp_path / "evotok_plugin").mkdir()
    (tmp_path / "evotok_plugin" / "__init__.py").touch()
    command = [sys.executable, str(ROOT / "scripts" / "lib" / "missing.py"), "train"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    lacking = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert lacking == f"evotok of this checkout (it has {tmp_path / 'evotok_plugin' / '__init__.py'})\n"


def test_what_an_environment_lacks_is_listed(monkeypatch):
    lacking = runpy.run_path(str(ROOT / "scripts" / "lib" / "missing.py"))["missing"]
    known = lacking.__globals__["version"]

    def version(name):
        if name == "deepspeed":
            raise PackageNotFoundError(name)
        return "1.0" if name == "peft" else known(name)

    monkeypatch.setitem(lacking.__globals__, "version", version)
    assert sorted(one[:9] for one in lacking({"train"})) == ["deepspeed", "peft<0.22"]
    assert lacking({"demo"}) == [] == lacking(set())
    assert len(lacking({"all"})) == 2


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
