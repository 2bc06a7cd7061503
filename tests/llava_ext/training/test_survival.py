"""Runs that are stopped or killed, run out of disk space or diverge: no checkpoint is lost, and they can be resumed.

A resumed run ends with the same weights as an uninterrupted one.
"""

import io
import json
import os
import resource
import shutil
import signal
import tarfile

import pytest
import torch
from safetensors.torch import load_file
from stage_runs import exit_codes_when, losses, run, run_forked, stage_exit, start_forked, write_recipe

from evotok_plugin.common.processes import Processes
from evotok_plugin.errors import UserError
from llava_ext.model_folder import load_model
from llava_ext.training import checkpoints as checkpoints_module
from llava_ext.training.checkpoints import (
    MARKER,
    RunShape,
    checkpoints,
    drop_incomplete,
    find_resumable,
    finish_checkpoint,
    is_complete,
    publish,
)


@pytest.fixture(scope="module")
def base(tiny_mllm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    model, processor = tiny_mllm
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def recipe(base, tiny_evotok_folder, scene_folder, tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("recipes"), base, tiny_evotok_folder, scene_folder)


ALONE = Processes(0, 1, torch.device("cpu"))
METHODS = {
    "plain": {"deepspeed": "none"},
    "zero2": {"deepspeed": "zero2"},
    "zero3": {"deepspeed": "zero3"},
    "lora plain": {"deepspeed": "none", "lora_enable": "true", "lora_r": 4},
    "lora zero2": {"deepspeed": "zero2", "lora_enable": "true", "lora_r": 4},
    "lora zero3": {"deepspeed": "zero3", "lora_enable": "true", "lora_r": 4},
    "qlora zero2": {"deepspeed": "zero2", "lora_enable": "true", "lora_r": 4, "bits": 4},
    "qlora zero3": {"deepspeed": "zero3", "lora_enable": "true", "lora_r": 4, "bits": 4},
}
FAST = ("plain", "zero2", "zero3", "lora zero2")
BY_METHOD = [method if method in FAST else pytest.param(method, marks=pytest.mark.slow) for method in METHODS]
# Half of the prompts are dropped, and the run is cut in its second epoch: the order of the data must continue.
LONG = {
    "max_steps": 10,
    "save_steps": 4,
    "save_total_limit": 3,
    "per_device_train_batch_size": 16,
    "prompt_dropout": 0.5,
}


@pytest.fixture(scope="module")
def uninterrupted(recipe, tmp_path_factory):
    """The folder of an uninterrupted run, by its settings."""
    made = {}

    def of(settings, world_size=1):
        key = (world_size, *sorted(settings.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("uninterrupted") / "run"
            run_forked(run, recipe, made[key], settings, world_size=world_size)
        return made[key]

    return of


def trained_weights(output):
    found = output / "model.safetensors"
    return load_file(found if found.exists() else output / "adapter" / "adapter_model.safetensors")


def assert_same_end(one, other):
    """Check that two runs have the same losses, step by step, and the same weights."""
    assert losses(one) == pytest.approx(losses(other), abs=1e-6)
    expected, got = trained_weights(one), trained_weights(other)
    assert set(expected) == set(got)
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, atol=1e-6, rtol=0, msg=name)


def cut_after(complete, output, step):
    """Copy a run in its state after a step, without later checkpoints and the finished model."""
    shutil.copytree(complete, output)
    for folder in checkpoints(output):
        if int(folder.name.split("-")[1]) > step:
            shutil.rmtree(folder)
    for name in ("finished.json", "model.safetensors"):
        (output / name).unlink(missing_ok=True)
    shutil.rmtree(output / "adapter", ignore_errors=True)
    lines = (output / "metrics.jsonl").read_text().splitlines(keepends=True)
    (output / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= step))


# Resuming ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", BY_METHOD)
def test_a_resumed_run_equals_the_uninterrupted_one(method, recipe, uninterrupted, tmp_path):
    settings = {**LONG, **METHODS[method]}
    complete = uninterrupted(settings)
    assert json.loads((complete / "checkpoint-8" / "trainer_state.json").read_text())["epoch"] > 1
    cut_after(complete, tmp_path / "resumed", step=8)
    run_forked(run, recipe, tmp_path / "resumed", settings)
    assert_same_end(complete, tmp_path / "resumed")


def test_a_resumed_packed_run_equals_the_uninterrupted_one(recipe, uninterrupted, tmp_path):
    settings = {**LONG, **METHODS["zero2"], "packing": True, "per_device_train_batch_size": 1}
    complete = uninterrupted(settings)
    cut_after(complete, tmp_path / "resumed", step=8)
    run_forked(run, recipe, tmp_path / "resumed", settings)
    assert_same_end(complete, tmp_path / "resumed")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["zero2", "zero3", "lora zero3"])
def test_a_resumed_run_of_two_processes_with_data_workers_equals_the_uninterrupted_one(
    method, recipe, uninterrupted, tmp_path
):
    settings = {**LONG, **METHODS[method], "per_device_train_batch_size": 8, "dataloader_num_workers": 1}
    complete = uninterrupted(settings, world_size=2)
    cut_after(complete, tmp_path / "resumed", step=8)
    run_forked(run, recipe, tmp_path / "resumed", settings, world_size=2)
    assert_same_end(complete, tmp_path / "resumed")


def test_a_run_with_all_its_steps_only_publishes_the_model(recipe, tmp_path):
    """As after a kill between the last checkpoint and the end; Trainer would train another step."""
    run_forked(run, recipe, tmp_path / "run", {"max_steps": -1, "num_train_epochs": 0.25})
    steps = max(losses(tmp_path / "run"))
    before = trained_weights(tmp_path / "run")
    for name in ("finished.json", "model.safetensors"):
        (tmp_path / "run" / name).unlink()
    run_forked(run, recipe, tmp_path / "run", {"max_steps": -1, "num_train_epochs": 0.25})
    assert max(losses(tmp_path / "run")) == steps
    for name, tensor in trained_weights(tmp_path / "run").items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.slow
def test_a_finished_run_can_be_extended(recipe, tmp_path):
    constant = {"lr_scheduler_type": "constant"}
    run_forked(run, recipe, tmp_path / "short", {**constant, "max_steps": 2})
    (tmp_path / "short" / "finished.json").unlink()
    run_forked(run, recipe, tmp_path / "short", constant)
    run_forked(run, recipe, tmp_path / "long", constant)
    assert_same_end(tmp_path / "long", tmp_path / "short")


# Signals -----------------------------------------------------------------------------------------------------


def has_steps(output, count):
    """A condition: the run has logged `count` steps."""
    return lambda: (output / "metrics.jsonl").exists() and len(losses(output)) >= count


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_stopped_run_saves_its_step_and_resumes_from_it(recipe, tmp_path, number, code):
    settings = {"max_steps": 40, "save_steps": 1000}
    reached = has_steps(tmp_path / "run", 3)
    assert exit_codes_when(reached, number, run, recipe, tmp_path / "run", settings) == [code]
    (saved,) = checkpoints(tmp_path / "run")
    assert is_complete(saved) and 3 <= int(saved.name.split("-")[1]) < 40
    assert not (tmp_path / "run" / "finished.json").exists()
    load_model(saved)
    run_forked(run, recipe, tmp_path / "run", settings)
    run_forked(run, recipe, tmp_path / "complete", settings)
    assert_same_end(tmp_path / "complete", tmp_path / "run")


def test_a_signal_to_one_process_stops_all_at_the_same_step(recipe, tmp_path):
    settings = {"max_steps": 60, "save_steps": 1000}
    reached, two = has_steps(tmp_path / "run", 2), {"world_size": 2, "only_first": True}
    assert exit_codes_when(reached, signal.SIGTERM, run, recipe, tmp_path / "run", settings, **two) == [143, 143]
    (saved,) = checkpoints(tmp_path / "run")
    assert is_complete(saved)


# kill -9 -----------------------------------------------------------------------------------------------------


def kill_while_saving(recipe, output, settings, pattern, world_size=1):
    """Kill all processes as soon as a file of checkpoint-8 appears; returns whether the checkpoint is incomplete."""

    def appeared():
        return any((output / "checkpoint-8").glob(pattern))

    codes = exit_codes_when(appeared, signal.SIGKILL, run, recipe, output, settings, world_size=world_size)
    assert codes[0] == -signal.SIGKILL
    return not is_complete(output / "checkpoint-8")


def test_a_run_killed_while_it_saves_can_be_resumed(recipe, uninterrupted, tmp_path):
    settings, killed = {**LONG, **METHODS["zero2"]}, tmp_path / "killed"
    assert kill_while_saving(recipe, killed, settings, "model.safetensors"), "killed too late"
    assert find_resumable(killed, RunShape(1, 2)).name == "checkpoint-4"
    run_forked(run, recipe, killed, settings)
    assert_same_end(uninterrupted(settings), killed)
    entries = [json.loads(line) for line in (killed / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries if "loss" in entry] == list(range(1, 11))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["plain", "zero2", "zero3", "lora zero3"])
@pytest.mark.parametrize("pattern", ["*.safetensors", "*", "rng_state*", "trainer_state.json"])
def test_a_run_killed_at_any_point_of_saving_can_be_resumed(method, pattern, recipe, uninterrupted, tmp_path):
    settings, world_size = {**LONG, **METHODS[method]}, 1 if method == "plain" else 2
    kill_while_saving(recipe, tmp_path / "killed", settings, pattern, world_size)
    run_forked(run, recipe, tmp_path / "killed", settings, world_size=world_size)
    assert_same_end(uninterrupted(settings, world_size), tmp_path / "killed")


@pytest.mark.slow
def test_a_run_killed_repeatedly_equals_the_uninterrupted_one(recipe, tmp_path):
    """Kills at random times: while libraries load, images are encoded, steps are computed, files are written."""
    import random
    import time

    settings, rng = {"max_steps": 12, "save_steps": 1, "code_cache": str(tmp_path / "codes")}, random.Random(0)
    for _ in range(12):
        ranks, _ = start_forked(run, recipe, tmp_path / "killed", settings)
        time.sleep(rng.uniform(0.05, 2.0))
        ranks[0].kill()
        ranks[0].join()
    run_forked(run, recipe, tmp_path / "killed", settings)
    run_forked(run, recipe, tmp_path / "complete", {**settings, "code_cache": str(tmp_path / "complete_codes")})
    assert_same_end(tmp_path / "complete", tmp_path / "killed")


def write_checkpoint(folder, files=("model.safetensors",)):
    folder.mkdir(parents=True)
    for name in files:
        (folder / name).write_text(name)


def test_the_oldest_checkpoint_is_deleted_only_when_the_newest_is_complete(tmp_path, monkeypatch):
    for step in (1, 2):
        write_checkpoint(tmp_path / f"checkpoint-{step}")
        finish_checkpoint(tmp_path / f"checkpoint-{step}", RunShape(1), ALONE, keep=1)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2"]
    write_checkpoint(tmp_path / "checkpoint-3")
    monkeypatch.setattr(checkpoints_module, "mark_complete", _killed)
    with pytest.raises(KeyboardInterrupt):
        finish_checkpoint(tmp_path / "checkpoint-3", RunShape(1), ALONE, keep=1)
    assert find_resumable(tmp_path, RunShape(1)).name == "checkpoint-2"


def _killed(*arguments):
    raise KeyboardInterrupt


def test_partial_checkpoints_are_deleted_and_damaged_ones_are_kept(tmp_path):
    for step in (1, 2, 3):
        write_checkpoint(tmp_path / f"checkpoint-{step}")
        finish_checkpoint(tmp_path / f"checkpoint-{step}", RunShape(1), ALONE, None)
    (tmp_path / "checkpoint-2" / "model.safetensors").write_text("cut")
    (tmp_path / "checkpoint-3" / MARKER).unlink()
    assert find_resumable(tmp_path, RunShape(1)).name == "checkpoint-1"
    drop_incomplete(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".evotok.json",
        "checkpoint-1",
        "damaged-checkpoint-2",
    ]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(tmp_path):
    write_checkpoint(tmp_path / "checkpoint-2")
    finish_checkpoint(tmp_path / "checkpoint-2", RunShape(1), ALONE, None)
    (tmp_path / "checkpoint-2" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="was complete and has been changed.*--overwrite true"):
        find_resumable(tmp_path, RunShape(1))


def test_publishing_does_not_write_into_a_link_that_a_killed_process_has_left(tmp_path):
    write_checkpoint(tmp_path / "checkpoint-1")
    write_checkpoint(tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2" / "model.safetensors").write_text("new")
    os.link(tmp_path / "checkpoint-1" / "model.safetensors", tmp_path / ".model.safetensors.part")
    publish(tmp_path / "checkpoint-2", tmp_path)
    assert (tmp_path / "model.safetensors").read_text() == "new"
    assert (tmp_path / "checkpoint-1" / "model.safetensors").read_text() == "model.safetensors"


def test_a_model_is_published_without_the_files_of_the_trainer(tmp_path):
    names = ("model.safetensors", "config.json", MARKER, "scheduler.pt", "latest", "rng_state.pth")
    write_checkpoint(tmp_path / "checkpoint-1", names)
    publish(tmp_path / "checkpoint-1", tmp_path)
    files = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert files == {".evotok.json", "model.safetensors", "config.json"}


# Disk, data, diverging losses -----------------------------------------------------------------------------------------


def _on_a_full_disk(recipe, output, settings, limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    return stage_exit(recipe, output, settings)


@pytest.mark.parametrize("method", [pytest.param(m, marks=[pytest.mark.slow] * (m != "zero2")) for m in METHODS])
def test_a_full_disk_stops_the_run_and_keeps_the_previous_checkpoint(method, recipe, uninterrupted, tmp_path):
    settings, output = {**LONG, **METHODS[method]}, tmp_path / "run"
    cut_after(uninterrupted(settings), output, step=4)
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    code, line = run_forked(_on_a_full_disk, recipe, output, flags, 20_000)
    assert code == 2, line
    assert "the checkpoint of step 8 cannot be written" in line and "checkpoint-4 is kept" in line
    assert [path.name for path in checkpoints(output)] == ["checkpoint-4"]
    run_forked(run, recipe, output, settings)
    assert_same_end(uninterrupted(settings), output)


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(recipe, tmp_path):
    flags = ["--learning_rate", "1e30", "--max_grad_norm", "0", "--save_steps", "1", "--lr_scheduler_type", "constant"]
    code, line = run_forked(stage_exit, recipe, tmp_path / "run", flags)
    assert code == 2 and "the loss is NaN or infinite" in line and "--learning_rate" in line
    kept = checkpoints(tmp_path / "run")
    assert f"step {int(kept[-1].name.split('-')[1]) + 1}:" in line and is_complete(kept[-1])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_code_cache_that_vanishes_while_training_is_named(recipe, tmp_path, workers):
    flags = ["--code_cache", str(tmp_path / "codes"), "--dataloader_num_workers", str(workers)]
    code, line = run_forked(_with_vanishing_files, recipe, tmp_path / "run", flags, tmp_path / "codes", "shard-*.npy")
    assert code == 2 and "shard-000000.npy" in line and "evotok encode" in line and line.startswith("error: ")


def test_a_shard_of_records_that_vanishes_while_training_is_named(recipe, tmp_path):
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    shards = tmp_path / "shards"
    shards.mkdir()
    for number in range(2):
        with tarfile.open(shards / f"{number}.tar", "w") as archive:
            for sample in range(8):
                content = json.dumps({"conversations": turns}).encode()
                member = tarfile.TarInfo(f"{sample}.json")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    flags = ["--data_path", str(shards / "*.tar"), "--dataloader_num_workers", "1"]
    flags += ["--tune_projectors", "false", "--tune_image_head", "false"]  # the data has no images to train them
    code, line = run_forked(_with_vanishing_files, recipe, tmp_path / "run", flags, shards, "1.tar")
    assert code == 2 and "1.tar" in line and line.startswith("error: ")


def _with_vanishing_files(recipe, output, flags, folder, pattern):
    from llava_ext.training import train

    build = train.build_dataset

    def build_then_lose(*arguments):
        dataset = build(*arguments)
        for file in folder.glob(pattern):
            os.remove(file)
        return dataset

    train.build_dataset = build_then_lose
    return stage_exit(recipe, output, flags)


def test_a_missing_code_cache_is_rebuilt_on_resume(recipe, uninterrupted, tmp_path):
    settings = {**LONG, **METHODS["zero2"]}
    cut_after(uninterrupted(settings), tmp_path / "run", step=8)
    run_forked(run, recipe, tmp_path / "run", {**settings, "code_cache": str(tmp_path / "new")})
    assert_same_end(uninterrupted(settings), tmp_path / "run")
