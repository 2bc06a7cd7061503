"""The real training command on tiny random models: DeepSpeed engine, resuming, two processes, bad input.

Every run is a forked process, so process groups and environments are separate and libraries are imported once.
"""

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file
from stage_runs import losses, run, run_forked, stage_exit, write_recipe

from evotok_plugin.errors import UserError
from llava_ext.model_folder import load_model
from llava_ext.training import train
from llava_ext.training.checkpoints import MARKER, RunShape, find_resumable, finished_facts, is_complete


@pytest.fixture(scope="module")
def recipe(tiny_backbone_folder, tiny_evotok_folder, scene_folder, tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("recipes"), tiny_backbone_folder, tiny_evotok_folder, scene_folder)


def metrics(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    """An uninterrupted run of four steps with everything but the tokenizer trained."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    run_forked(run, recipe, output)
    return output


def test_a_run_writes_a_model_its_metrics_and_its_recipe(finished):
    model, processor = load_model(finished)
    assert len(model.generate_images("a ring", processor)) == 1
    lines = metrics(finished)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert any("text_loss" in line for line in lines) and any("image_loss" in line for line in lines)
    assert finished_facts(finished)["steps"] == 4
    assert yaml.safe_load((finished / "recipe.yaml").read_text())["deepspeed"] == "zero2"
    assert not list(finished.glob("*.bin")), "no pickles in the model folder"
    assert is_complete(finished / "checkpoint-4") and (finished / "checkpoint-4" / "global_step4").is_dir()


def test_a_finished_run_is_not_repeated(finished, recipe):
    before = (finished / "model.safetensors").stat().st_mtime_ns
    run_forked(run, recipe, finished)
    assert (finished / "model.safetensors").stat().st_mtime_ns == before


def test_a_resumed_run_equals_the_uninterrupted_one(finished, recipe, tmp_path):
    """The newest checkpoint is incomplete, as after a kill while saving: the run resumes from the previous one."""
    output = tmp_path / "broken"
    shutil.copytree(finished, output)
    for name in ("model.safetensors", "finished.json"):
        (output / name).unlink()
    (output / "checkpoint-4" / MARKER).unlink()
    assert find_resumable(output, RunShape(1, 2)).name == "checkpoint-2"
    run_forked(run, recipe, output)
    expected, resumed = load_file(finished / "model.safetensors"), load_file(output / "model.safetensors")
    for name, tensor in expected.items():
        assert torch.equal(tensor, resumed[name]), name
    assert losses(output) == losses(finished)


def test_another_number_of_processes_is_rejected_with_a_remedy(finished):
    with pytest.raises(UserError, match="written by 1 processes .* NPROC=1"):
        find_resumable(finished, RunShape(2, 2))


def test_a_checkpoint_of_another_engine_is_rejected(finished):
    with pytest.raises(UserError, match="zero_stage 2 and cannot be resumed with 3"):
        find_resumable(finished, RunShape(1, 3))


def test_stage_one_does_not_change_the_language_model(recipe, tiny_backbone_folder, tmp_path):
    only_images = [yaml.safe_load(recipe.read_text())["data_path"][0]]
    frozen = {"tune_language_model": "false", "max_steps": 2, "data_path": only_images}
    run_forked(run, recipe, tmp_path / "pretrain", frozen)
    model, _ = load_model(tmp_path / "pretrain")
    before = load_file(tiny_backbone_folder / "model.safetensors")
    after = model.language_model.state_dict()
    for name, tensor in before.items():
        if name.startswith("model.layers"):
            assert torch.equal(tensor, after[name.removeprefix("model.")]), name


def test_two_processes_with_different_kinds_of_batches(recipe, tmp_path):
    """One rank may read an image while the other has only text: all gradients must still be reduced."""
    run_forked(run, recipe, tmp_path / "two", world_size=2)
    assert json.loads((tmp_path / "two" / "checkpoint-4" / MARKER).read_text())["world_size"] == 2
    load_model(tmp_path / "two")


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_bf16_does_not_change_the_tokenizer(recipe, tiny_evotok_folder, tmp_path, engine):
    """The engine casts the weights that it trains; rounded codebooks would give other codes."""
    run_forked(run, recipe, tmp_path / "bf16", {"bf16": "true", "use_cpu": "true", "max_steps": 2, "deepspeed": engine})
    model, _ = load_model(tmp_path / "bf16")
    for name, tensor in load_file(tiny_evotok_folder / "model.safetensors").items():
        assert torch.equal(tensor, model.vision_tower.state_dict()[name]), name
    saved = load_file(tmp_path / "bf16" / "model.safetensors")
    assert saved["language_model.layers.0.self_attn.q_proj.weight"].dtype == torch.bfloat16
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--recipe", "no_such_recipe"], "unknown recipe 'no_such_recipe'; expected"),
        (["--learning_rate", "fast"], "learning_rate: could not convert"),
        (["--data_path", "absent.json"], "absent.json does not exist"),
        (["--vision_tower", "nowhere"], "'nowhere' does not exist"),
        (["--model_name_or_path", "nowhere"], "'nowhere' does not exist"),
        (["--deepspeed", "zero9"], "'zero9' not found; expected"),
        (["--image_folder", "nowhere"], "not found in nowhere"),
    ],
)
def test_bad_input_is_reported_in_one_line(recipe, tmp_path, flags, message):
    if flags[0] == "--recipe":
        recipe, flags = flags[1], []
    code, line = run_forked(stage_exit, recipe, tmp_path / "out", flags)
    assert code == 2 and line.startswith("error: ") and message in line


def test_an_unknown_recipe_key_suggests_the_nearest(recipe, tmp_path):
    values = yaml.safe_load(recipe.read_text()) | {"learning_rat": 1}
    path = tmp_path / "typo.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match="unknown key 'learning_rat'; did you mean 'learning_rate'"):
        run(path, tmp_path / "out")


def test_a_user_error_has_a_traceback_with_debug(capsys):
    assert train.main(["--recipe", "no_such_recipe"]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert train.main(["--recipe", "no_such_recipe", "--debug"]) == 2
    error = capsys.readouterr().err
    assert "Traceback" in error and error.splitlines()[-1].startswith("error: unknown recipe 'no_such_recipe'")


def test_an_unsupported_flag_of_llava_is_a_user_error(capsys):
    assert train.main(["--recipe", "finetune", "--pretrain_mm_mlp_adapter", "x.bin"]) == 2
    assert "error: --pretrain_mm_mlp_adapter x.bin: expected the output folder of stage 1" in capsys.readouterr().err


def test_other_exceptions_than_user_errors_are_not_caught(monkeypatch):
    def fail(recipe, overrides, stage):
        raise ValueError(f"{recipe} {overrides}")

    monkeypatch.setattr(train, "run_stage", fail)
    with pytest.raises(ValueError, match="finetune {'seed': '3'}"):
        train.main(["--recipe", "finetune", "--seed", "3", "--version", "v1"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--optim", "adafactorr"], "adafactorr"),
        (["--attn_implementation", "fast"], "fast"),
        (["--lr_scheduler_kwargs", '{"nonsense": 1}'], "lr_scheduler_kwargs {'nonsense': 1}: "),
    ],
)
def test_values_that_a_library_rejects_are_reported_in_one_line(recipe, tmp_path, flags, message):
    code, line = run_forked(stage_exit, recipe, tmp_path / "out", [*flags, "--deepspeed", "none"])
    assert code == 2 and line.startswith("error: ") and message in line


def test_broken_images_are_counted_named_and_limited(recipe, scene_folder, tmp_path):
    broken = tmp_path / "images"
    shutil.copytree(scene_folder / "train", broken)
    (broken / "images" / "000003.png").write_bytes(b"not a picture")
    flags = ["--image_folder", str(broken), "--code_cache", str(tmp_path / "codes")]
    _, text = run_forked(stage_exit, recipe, tmp_path / "strict", flags)
    assert "samples are unusable, over the limit of 0.10%" in text and "000003.png" in text
    tolerant = {"image_folder": str(broken), "code_cache": str(tmp_path / "codes"), "max_bad_fraction": 0.1}
    run_forked(run, recipe, tmp_path / "tolerant", {**tolerant, "max_steps": 1})
    assert "000003.png" in (tmp_path / "tolerant" / "bad_samples.jsonl").read_text()


def test_losses_are_weighted_by_the_settings(recipe, tmp_path):
    settings = {"packing": True, "per_device_train_batch_size": 1, "logging_steps": 1}
    run_forked(run, recipe, tmp_path / "run", {**settings, "text_loss_weight": 0.5, "image_loss_weight": 2.0})
    lines = [line for line in metrics(tmp_path / "run") if "text_loss" in line and "image_loss" in line]
    assert len(lines) >= 2
    for line in lines:
        assert line["loss"] == pytest.approx(0.5 * line["text_loss"] + 2 * line["image_loss"], rel=1e-3)


def test_trained_groups_learning_rates_and_outputs_are_logged(recipe, tmp_path):
    text = run_forked(_log_of, recipe, tmp_path / "run", {"max_steps": 1, "mm_projector_lr": 2e-5})
    lines = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert "frozen" in lines["vision_tower"] and "learning rate 0.001" in lines["language_model"]
    assert "learning rate 2e-05, " in lines["read_projector"]
    assert "learning rate 0.001, 54 samples" in lines["image_head"]
    assert "the whole model" in lines["saved"]


def _log_of(recipe, output, overrides):
    import io
    import logging

    written = io.StringIO()
    logging.getLogger("llava_ext").addHandler(logging.StreamHandler(written))
    run(recipe, output, overrides)
    return written.getvalue()
