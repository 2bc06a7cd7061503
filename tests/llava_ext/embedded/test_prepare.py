import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from evotok_plugin.common.recipes import load_recipe, recipe_values, recipes_folder
from evotok_plugin.configuration_evotok import EvoTokConfig
from evotok_plugin.training.config import TokenizerTrainingConfig
from llava_ext.embedded import prepare
from llava_ext.embedded.prepare import DONE, holds_model, make, uses_embedded_default
from llava_ext.training.config import StageConfig
from llava_ext.training.deepspeed_config import find_deepspeed_config, read_deepspeed_config

ROOT = Path(__file__).resolve().parents[3]
RECIPES = sorted(recipes_folder("llava_ext").glob("*.yaml"))
TOKENIZER_RECIPES = sorted(recipes_folder("evotok_plugin").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_of_a_stage_fits_its_schema(path):
    assert find_deepspeed_config(recipe_values(path, StageConfig, {})["deepspeed"]).is_file()


@pytest.mark.parametrize("name", ["tiny", "photos", "base", "paper", "paper_384"])
def test_every_tokenizer_recipe_fits_its_schema_and_preset(name):
    given = {"data": "x", "output_dir": "y"} | ({"teacher": "z"} if name == "tiny" else {})
    config = load_recipe(name, TokenizerTrainingConfig, given)
    assert EvoTokConfig.preset(config.preset, **config.model).num_positions > 0 and config.data == ["x"]


def test_only_the_embedded_recipes_ask_for_preparation():
    assert uses_embedded_default("pretrain", [])
    assert uses_embedded_default("pretrain", ["--max_steps", "3"])
    assert not uses_embedded_default("pretrain", ["--data_path", "mine.json"])
    assert not uses_embedded_default("pretrain", ["--model_name_or_path=llm"])
    for later in ("finetune", "finetune_lora", "finetune_qlora"):
        assert not uses_embedded_default(later, [])
    assert not uses_embedded_default("paper", [])


def test_a_step_is_done_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "thing"

    def fail(out):
        (out / "half").write_text("x")
        raise ValueError("stopped")

    with pytest.raises(ValueError, match="stopped"):
        make(folder, "a thing", fail, holds_model())
    assert not folder.exists()
    make(folder, "a thing", lambda out: (out / "whole").write_text("x"), holds_model())
    assert {path.name for path in folder.iterdir()} == {"whole", DONE}
    make(folder, "a thing", fail, holds_model())  # there already: not built again


def test_a_folder_of_the_user_is_used_or_named_and_never_deleted(tmp_path):
    folder = tmp_path / "evotok"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")

    def build(out):
        raise AssertionError("nothing must be built")

    with pytest.raises(ValueError, match="evotok was not made by this program .* --workspace"):
        make(folder, "a tokenizer", build, holds_model("evotok"))
    (folder / "config.json").write_text('{"model_type": "evotok"}')
    (folder / "model.safetensors").touch()
    make(folder, "a tokenizer", build, holds_model("evotok"))
    with pytest.raises(ValueError, match="was not made by this program"):
        make(folder, "a teacher", build, holds_model("siglip_vision_model"))
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "notes.txt"]


def test_every_place_is_checked_before_the_first_step(tmp_path, capsys):
    (tmp_path / "evotok").mkdir()
    (tmp_path / "evotok" / "notes.txt").write_text("mine")
    assert prepare.main(["--workspace", str(tmp_path)]) == 2
    assert "evotok was not made by this program" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["evotok"]


def test_flags_are_checked_before_anything_is_prepared(tmp_path, capsys):
    command = ["--recipe", "pretrain", "--workspace", str(tmp_path / "new"), "--learnin_rate", "1"]
    assert prepare.main(command) == 2
    assert "did you mean --learning_rate" in capsys.readouterr().err and not (tmp_path / "new").exists()


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").rglob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_valid_bash(script):
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize("method", ["finetune", "finetune_lora", "finetune_qlora"])
def test_every_method_is_one_script_over_the_recipe_of_its_name(method):
    lines = (ROOT / "scripts" / f"{method}.sh").read_text().splitlines()
    assert len(lines) < 10 and lines[-1] == f'train_stage {method} "$@"'
    values = recipe_values(method, StageConfig, {})
    assert values.get("lora_enable", False) == (method != "finetune")
    assert values.get("bits", 16) == (4 if method == "finetune_qlora" else 16)


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_configurations_leave_to_the_recipe_what_is_the_recipe_s(stage):
    for name in {2: ["zero2"], 3: ["zero3", "zero3_offload"]}[stage]:
        settings = read_deepspeed_config(name)
        assert settings["zero_optimization"]["stage"] == stage and "optimizer" not in settings
        assert settings["train_batch_size"] == settings["bf16"]["enabled"] == "auto"
        if stage == 3:
            assert settings["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True


TORCHRUN = [sys.executable, str(ROOT / "scripts" / "lib" / "torchrun.py"), "--standalone", "--nproc_per_node", "2"]


def test_several_processes_end_with_the_exit_code_of_one(tmp_path):
    (tmp_path / "job.py").write_text("import sys\nsys.exit(2)\n")
    ended = subprocess.run([*TORCHRUN, str(tmp_path / "job.py")], capture_output=True, text=True)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr


def test_several_processes_that_are_stopped_end_as_one_does(tmp_path):
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


def test_recipes_are_short_mappings():
    assert RECIPES and TOKENIZER_RECIPES
    for path in [*RECIPES, *TOKENIZER_RECIPES]:
        assert isinstance(yaml.safe_load(path.read_text()), dict)
