"""Training of models with the flat head by the real command: engines, adapters, resuming, memory."""

import pytest
import torch
import yaml
from safetensors.torch import load_file
from stage_runs import losses, run, run_forked, stage_exit, train_one_step, write_recipe

from llava_ext.model_folder import load_model
from llava_ext.training.adapters import merge
from llava_ext.training.estimate import estimate_run

LORA = {"lora_enable": "true", "lora_r": 4, "lora_alpha": 8, "learning_rate": 1e-2, "lora_dropout": 0.0}
KINDS = ["tied", "free"]


@pytest.fixture(scope="module")
def recipe(tiny_backbone_folder, tiny_evotok_folder, scene_folder, tmp_path_factory):
    path = write_recipe(tmp_path_factory.mktemp("recipes"), tiny_backbone_folder, tiny_evotok_folder, scene_folder)
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"image_head": "flat"}))
    return path


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    """An uninterrupted run of four steps."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    run_forked(run, recipe, output)
    return output


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_near(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-4, msg=name)


def test_a_run_writes_a_flat_model_without_parameters_of_the_other_head(finished):
    model, processor = load_model(finished)
    assert model.config.image_head == processor.image_head == "flat"
    assert not [name for name in weights(finished) if "write_projector" in name]
    assert len(model.generate_images("a ring", processor)) == 1


def test_a_resumed_run_equals_the_uninterrupted_one(finished, recipe, tmp_path):
    import shutil

    shutil.copytree(finished / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    run_forked(run, recipe, tmp_path / "again")
    for name, tensor in weights(finished).items():
        assert torch.equal(weights(tmp_path / "again")[name], tensor), name


def test_stage_2_keeps_the_flat_head_of_its_model_by_default(finished, recipe, tmp_path):
    values = yaml.safe_load(recipe.read_text()) | {"model_name_or_path": str(finished), "max_steps": 1}
    del values["image_head"]
    (tmp_path / "stage2.yaml").write_text(yaml.safe_dump(values))
    run_forked(run, tmp_path / "stage2.yaml", tmp_path / "out")
    assert load_model(tmp_path / "out")[0].config.image_head == "flat"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--image_head", "depth"], "image_head is 'flat'"),
        (["--residual_embeddings", "free"], "residual_embeddings is 'tied'"),
        (["--image_head", "flatt"], "expected depth or flat, got 'flatt'"),
    ],
)
def test_another_head_than_that_of_the_model_is_rejected(finished, recipe, tmp_path, flags, message):
    flags = ["--model_name_or_path", str(finished), *flags]
    code, line = run_forked(stage_exit, recipe, tmp_path / "out", flags)
    assert code == 2 and message in line


@pytest.mark.parametrize("kind", KINDS)
def test_zero3_on_two_processes_gives_the_model_of_zero2(recipe, tmp_path, kind):
    """Each batch of the scenes has one kind of sample, so the processes run different modules at the same time."""
    for engine in ("zero2", "zero3"):
        overrides = {"residual_embeddings": kind, "deepspeed": engine, "max_steps": 2}
        run_forked(run, recipe, tmp_path / engine, overrides, world_size=2)
    assert_near(weights(tmp_path / "zero3"), weights(tmp_path / "zero2"))
    assert losses(tmp_path / "zero3") == pytest.approx(losses(tmp_path / "zero2"), abs=1e-4)


def test_lora_from_a_causal_lm_can_be_merged_with_its_tokenizer(
    recipe, tiny_backbone_folder, tiny_evotok_folder, tmp_path
):
    run_forked(run, recipe, tmp_path / "run", {**LORA, "max_steps": 2, "residual_embeddings": "free"})
    merge(tiny_backbone_folder, tmp_path / "run" / "adapter", tmp_path / "merged", tiny_evotok_folder)
    for name, tensor in weights(tmp_path / "run").items():
        assert torch.equal(tensor, weights(tmp_path / "merged")[name]), name


def test_qlora_quantizes_the_backbone_and_merges_into_the_base(finished, recipe, tmp_path):
    overrides = {**LORA, "bits": 4, "max_steps": 1, "model_name_or_path": str(finished)}
    run_forked(run, recipe, tmp_path / "run", overrides)
    merge(finished, tmp_path / "run" / "adapter", tmp_path / "merged")
    assert set(weights(tmp_path / "merged")) == set(weights(finished))


@pytest.mark.parametrize("overrides", [{"gradient_checkpointing": "true"}, {"deepspeed": "none"}], ids=str)
def test_engines_and_gradient_checkpointing_do_not_change_losses(finished, recipe, tmp_path, overrides):
    run_forked(run, recipe, tmp_path / "other", overrides)
    assert losses(tmp_path / "other") == pytest.approx(losses(finished), abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "overrides", [{"packing": "true", "model_max_length": 128}, {"bf16": "true", "use_cpu": "true"}], ids=str
)
def test_packed_rows_and_bf16_can_be_trained(recipe, tmp_path, overrides, kind):
    run_forked(run, recipe, tmp_path / "run", {**overrides, "residual_embeddings": kind, "max_steps": 2})
    assert list(losses(tmp_path / "run")) == [1, 2]
    load_model(tmp_path / "run", dtype="auto")


@pytest.mark.parametrize("kind", KINDS)
def test_the_estimate_equals_the_memory_of_a_real_run(recipe, tmp_path, kind):
    overrides = {"residual_embeddings": kind, "tune_language_model": "false"}
    counts, weights, gradients, averages = run_forked(train_one_step, recipe, tmp_path, overrides)
    estimate = estimate_run(str(recipe), {**overrides, "deepspeed": "none"}, num_gpus=1)
    added = counts["language_model"][0] - estimate.parameters["language_model"][0]  # rows for the tokenizer
    assert estimate.parameters | {"language_model": None} == counts | {"language_model": None}
    assert (estimate.weights, estimate.gradients, estimate.optimizer) == (weights - 4 * added, gradients, averages)
