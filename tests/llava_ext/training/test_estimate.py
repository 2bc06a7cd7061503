"""`evotok-llava estimate` compared with real models and runs."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from stage_runs import run, run_forked, train_one_step, write_recipe
from torch import nn

from evotok_plugin.common.recipes import recipes_folder
from llava_ext.cli import main
from llava_ext.training.estimate import Workload, estimate_run, kept_bytes
from llava_ext.training.estimate_costs import GPUS, RESERVED, gpus_with

LORA = {"lora_enable": "true", "lora_r": 4}


@pytest.fixture(scope="module")
def recipe(tiny_backbone_folder, tiny_evotok_folder, scene_folder, tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("recipes"), tiny_backbone_folder, tiny_evotok_folder, scene_folder)


@pytest.fixture(scope="module")
def model_folder(tiny_mllm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model, processor = tiny_mllm
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "overrides", [{}, {"tune_language_model": "false"}, LORA], ids=["finetune", "pretrain", "lora"]
)
def test_parameters_and_model_states_are_those_of_a_real_run(recipe, model_folder, tmp_path, overrides):
    overrides = {"model_name_or_path": str(model_folder), **overrides}
    counts, weights, gradients, averages = run_forked(train_one_step, recipe, tmp_path, overrides)
    estimate = estimate_run(str(recipe), {**overrides, "deepspeed": "none"}, num_gpus=1)
    assert estimate.parameters == counts
    assert (estimate.weights, estimate.gradients, estimate.optimizer) == (weights, gradients, averages)


def test_the_count_of_a_model_to_be_assembled_is_that_of_the_model(recipe, tiny_mllm):
    model, _ = tiny_mllm
    counted = sum(every for every, _ in estimate_run(str(recipe), {}, 1).parameters.values())
    backbone = Path(yaml.safe_load(Path(recipe).read_text())["model_name_or_path"])
    rows = json.loads((backbone / "config.json").read_text())["vocab_size"]
    added = model.lm_head.out_features - rows  # rows for the tokenizer, unknown to the configuration
    assert counted == sum(p.numel() for p in model.parameters()) - 2 * 32 * added


def test_activations_are_the_tensors_that_autograd_keeps(recipe, model_folder, tiny_mllm):
    model, _ = tiny_mllm
    overrides = {"model_name_or_path": str(model_folder), "model_max_length": 256, "per_device_train_batch_size": 8}
    estimate = estimate_run(str(recipe), overrides, 1)
    hidden = torch.randn(8, 256, 32, requires_grad=True)
    latents = torch.randn(8 * 9, 4, model.config.vision_config.codebook_dim)
    model.train()
    kept = kept_bytes(model, lambda: model.language_model(inputs_embeds=hidden, use_cache=False))
    kept += kept_bytes(model, lambda: model.image_head(hidden.flatten(0, 1)[: 8 * 9], latents))
    model.eval()
    assert estimate.activations == pytest.approx(kept, rel=0.1)


def test_kept_bytes_count_a_storage_once_and_no_weights():
    layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    x = torch.randn(2, 4, requires_grad=True)
    assert kept_bytes(layers, lambda: layers(x)) == 2 * 2 * 4 * 4  # the inputs of both layers
    assert kept_bytes(layers, lambda: x * x) == 2 * 4 * 4


def test_engines_and_checkpointing_save_memory(recipe):
    def of(gpus=1, **overrides):
        return estimate_run(str(recipe), overrides, gpus)

    assert of(4).optimizer == of(1).optimizer / 4 and of(4).gradients == of(1).gradients / 4
    assert of(4).weights == of(1).weights
    offloaded = of(4, deepspeed="zero3_offload")
    assert offloaded.optimizer == offloaded.gradients == 0 and offloaded.on_host > 0
    assert of(gradient_checkpointing="true").activations < of().activations
    assert of(bits=4, **LORA).weights < of(**LORA).weights
    assert of(4, gradient_accumulation_steps=3).samples_per_step == 4 * 4 * 3


def test_both_names_of_activation_checkpointing_have_the_same_effect(recipe):
    def activations(**overrides):
        return estimate_run(str(recipe), overrides, 1).activations

    checkpointed = activations(gradient_checkpointing="true")
    assert activations(activation_checkpointing="true") == checkpointed < activations()
    assert activations(activation_checkpointing="false", gradient_checkpointing="true") == activations()


@pytest.mark.parametrize("stage", [2, 3])
def test_automatic_bucket_sizes_are_those_of_transformers(recipe, tmp_path, stage):
    def estimate_with(reduce_size, prefetch_size):
        sizes = {"reduce_bucket_size": reduce_size, "stage3_prefetch_bucket_size": prefetch_size}
        config = tmp_path / "deepspeed.json"
        config.write_text(json.dumps({"zero_optimization": {"stage": stage, "offload_param": None, **sizes}}))
        return estimate_run(str(recipe), {"deepspeed": str(config)}, 2)

    assert estimate_with("auto", "auto") == estimate_with(32 * 32, int(0.9 * 32 * 32))  # the model is 32 wide
    assert estimate_with("auto", "auto").total < estimate_with(5e8, 5e7).total


def test_the_command_prints_a_table(recipe, capsys):
    assert main(["estimate", "--recipe", str(recipe), "--gpus", "2", "--bf16", "true"]) == 0
    text = capsys.readouterr().out
    for word in ("vision_tower", "language_model", "memory per GPU, ZeRO-2 over 2", "optimizer", "8 samples"):
        assert word in text, word


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model_name_or_path", "nobody/unknown-7B"], "the configuration of 'nobody/unknown-7B'"),
        (["--vision_tower", "nowhere"], "'nowhere' does not exist"),
        (["--gpus", "0"], "gpus must be at least 1"),
        (["--deepspeed", "zero9"], "'zero9' not found"),
    ],
)
def test_missing_input_is_reported_in_one_line(recipe, capsys, flags, message):
    assert main(["estimate", "--recipe", str(recipe), *flags]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_configuration_without_weights_gives_the_sizes_of_the_paper(tmp_path):
    """Qwen2.5-7B has 7.62 B parameters according to its model card."""
    from transformers import Qwen2Config

    sizes = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
    Qwen2Config(**sizes, num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False).save_pretrained(tmp_path)
    estimate = estimate_run("paper", {"model_name_or_path": str(tmp_path)}, 8)
    assert estimate.parameters["language_model"] == (7_615_616_512, 0)
    partitioned = estimate_run("paper", {"model_name_or_path": str(tmp_path), "deepspeed": "zero3"}, 8)
    assert partitioned.weights < estimate.weights / 3
    assert any("paper's tokenizer is assumed" in note for note in estimate.notes)


@pytest.mark.parametrize("name", sorted(path.stem for path in recipes_folder("llava_ext").glob("*.yaml")))
def test_every_recipe_is_estimated_with_nothing_downloaded(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a connection was opened"))
    estimate = estimate_run(name, {}, 8, Workload(num_samples=665_298))
    costs, shown = estimate.costs, str(estimate)
    assert estimate.total > 0 and costs.steps > 0 and costs.host >= 8 * estimate.weights > 0
    assert costs.disk > 2 * costs.checkpoint > 0
    assert all(f"{gpu} {costs.hours(gpu, 8):.1f}" in shown and costs.hours(gpu, 8) > 0 for gpu in GPUS)
    assert "GB per checkpoint" in shown and "host memory while loading" in shown and "fits with 2 GB to spare" in shown


def test_gpus_with_enough_memory():
    assert gpus_with(0) == list(GPUS) and gpus_with(200e9) == []
    assert gpus_with(22e9)[-2:] == ["4090", "3090"] and gpus_with(22.1e9)[-1] == "A6000"


@pytest.mark.parametrize(("name", "samples"), [("single_gpu_pretrain", 1_116_256), ("single_gpu_finetune", 665_298)])
def test_the_recipes_for_one_gpu_fit_into_24_gb(name, samples, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    estimate = estimate_run(name, {}, 1, Workload(samples))
    assert estimate.total + RESERVED < 24e9 and "3090 (24 GB)" in str(estimate)
    batch = yaml.safe_load((recipes_folder("llava_ext") / f"{name}.yaml").read_text())["reference_batch_size"]
    assert estimate.samples_per_step == batch == {"single_gpu_pretrain": 256, "single_gpu_finetune": 128}[name]
    page = (Path(__file__).parents[3] / "docs" / "resources.md").read_text()
    if name == "single_gpu_finetune":
        assert f"```text\n{str(estimate).partition(chr(10) + 'note:')[0]}\n```" in page
    else:
        assert f"{estimate.total / 2**30:.1f} GiB" in page and f"{estimate.costs.hours('4090', 1):.1f} hours" in page


def test_costs_of_the_second_stage_of_the_paper(tmp_path, monkeypatch, capsys):
    """A checkpoint holds 16 bytes per parameter: weights twice in bf16, and 12 bytes of optimizer state."""
    monkeypatch.chdir(tmp_path)
    assert main(["estimate", "--recipe", "paper_finetune", "--gpus", "8", "--samples", "665298"]) == 0
    shown = capsys.readouterr().out
    assert "GB per checkpoint" in shown and "H100" in shown and "5198 steps on 8 GPU(s)" in shown
    estimate = estimate_run("paper_finetune", {}, 8)
    trained = sum(count for _, count in estimate.parameters.values())
    assert estimate.costs.checkpoint == pytest.approx(16 * trained, rel=0.03) and trained > 8.0e9
    assert estimate.costs.steps == 0 and "--samples N" in str(estimate)
    few, many = (estimate_run("paper_finetune", {}, gpus, Workload(10**6)) for gpus in (8, 16))
    assert many.costs.hours("A100", 16) == pytest.approx(few.costs.hours("A100", 8) / 2, rel=0.01)


def test_the_checkpoint_on_disk_has_the_estimated_size(recipe, model_folder, tmp_path):
    given = {"model_name_or_path": str(model_folder), "output_dir": str(tmp_path / "run"), "max_steps": 1}
    for engine in ("none", "zero2"):
        overrides = {**given, "output_dir": str(tmp_path / engine), "deepspeed": engine}
        run_forked(run, recipe, tmp_path / engine, overrides)
        files = [path for path in (tmp_path / engine / "checkpoint-1").rglob("*") if path.is_file()]
        kept = [path for path in files if path.name not in ("tokenizer.json", "tokenizer_config.json")]
        size = sum(path.stat().st_size for path in kept)
        assert estimate_run(str(recipe), overrides, 1).costs.checkpoint == pytest.approx(size, rel=0.1)
