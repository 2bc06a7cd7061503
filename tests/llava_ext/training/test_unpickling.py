"""Checkpoints that would run code when they are resumed."""

import os
import subprocess

import pytest
import torch
from stage_runs import run, run_forked, stage_exit, write_recipe

from evotok_plugin.errors import UserError
from llava_ext.training.checkpoints import MARKER, RunShape, checkpoints, mark_complete
from llava_ext.training.unpickling import unpickling_without_code


class Code:
    """An object whose pickle creates a file when it is loaded unsafely."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return subprocess.check_call, (["touch", str(self.path)],)


@pytest.fixture(scope="module")
def recipe(tiny_mllm, tiny_evotok_folder, scene_folder, tmp_path_factory):
    base = tmp_path_factory.mktemp("base")
    for part in tiny_mllm:
        part.save_pretrained(base)
    return write_recipe(tmp_path_factory.mktemp("recipes"), base, tiny_evotok_folder, scene_folder)


def test_code_in_a_pickle_does_not_run_whatever_the_reader_asks_for(tmp_path, monkeypatch):
    torch.save({"state": torch.ones(2), "more": Code(tmp_path / "ran")}, tmp_path / "state.pt")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(UserError, match="checkpoint-4 is not resumed.*could run code.*--overwrite true"):
        with unpickling_without_code("checkpoint-4"):
            torch.load(tmp_path / "state.pt", weights_only=False)
    assert not (tmp_path / "ran").exists()
    assert os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD") == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


@pytest.mark.parametrize(
    ("deepspeed", "pattern"),
    [
        ("zero2", "global_step*/*optim_states.pt"),
        pytest.param("zero3", "global_step*/*model_states.pt", marks=pytest.mark.slow),
        pytest.param("none", "optimizer.pt", marks=pytest.mark.slow),
        pytest.param("none", "rng_state*.pth", marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_with_code_is_not_resumed(recipe, tmp_path, deepspeed, pattern):
    output, settings = tmp_path / "run", {"deepspeed": deepspeed, "max_steps": 2, "save_steps": 2}
    run_forked(run, recipe, output, settings)
    (output / "finished.json").unlink()
    (checkpoint,) = checkpoints(output)
    (state,) = checkpoint.glob(pattern)
    torch.save({"state": Code(tmp_path / "ran")}, state)
    (checkpoint / MARKER).unlink()
    mark_complete(checkpoint, RunShape(1, {"zero2": 2, "zero3": 3}.get(deepspeed, 0)))
    flags = ["--deepspeed", deepspeed, "--max_steps", "4", "--save_steps", "2"]
    code, line = run_forked(stage_exit, recipe, output, flags)
    assert not (tmp_path / "ran").exists()
    assert code == 2 and line.startswith("error: ") and "checkpoint-2 is not resumed" in line, line
