"""Settings of a stage: each takes effect or is rejected, also when a run is resumed."""

import importlib.util
import subprocess
import sys
from dataclasses import fields

import pytest
import yaml
from transformers import TrainingArguments

from evotok_plugin.errors import UserError
from evotok_plugin.training.reporters import check_reporters
from llava_ext.training import resume_rules, settings
from llava_ext.training.config import StageConfig, check_reporting, check_required
from llava_ext.training.launch import prepare_processes
from llava_ext.training.supported_arguments import SUPPORTED, UNSUPPORTED
from llava_ext.training.train import parse


def test_every_training_argument_is_supported_or_rejected():
    names = {field.name for field in fields(TrainingArguments)}
    assert not SUPPORTED & set(UNSUPPORTED) and SUPPORTED | set(UNSUPPORTED) == names


def test_every_setting_has_a_rule_for_resuming():
    tables = (resume_rules.IRRELEVANT, resume_rules.APPLIED, resume_rules.BY_CONTENT, resume_rules.REJECTED)
    names = [name for table in tables for name in table]
    assert len(names) == len(set(names)) and set(names) == {field.name for field in fields(StageConfig)}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("label_smoothing_factor", "0.5"),
        ("data_seed", "77"),
        ("train_sampling_strategy", "sequential"),
        ("do_eval", "true"),
        ("save_only_model", "true"),
        ("torch_compile", "true"),
        ("load_best_model_at_end", "true"),
        ("push_to_hub", "true"),
        ("save_strategy", "best"),
        ("eval_strategy", "steps"),
        ("fsdp", "full_shard"),
        ("debug", "underflow_overflow"),
    ],
)
def test_a_setting_without_effect_is_rejected(name, value):
    with pytest.raises(UserError, match=f"{name}=.* has no effect in a stage: "):
        settings.stage_values("finetune", {name: value})


@pytest.mark.parametrize(
    "given",
    [
        {"do_eval": "false"},
        {"eval_strategy": "no"},
        {"data_seed": "none"},
        {"debug": ""},
        {"hub_strategy": "every_save"},
    ],
)
def test_a_default_may_be_given(given):
    settings.stage_values("finetune", given)


def test_adapter_flags_require_adapters():
    with pytest.raises(UserError, match="--lora_r has no effect without --lora_enable true"):
        settings.stage_values("finetune", {"lora_r": "8"})
    with pytest.raises(UserError, match="--quant_type has no effect without --bits 4"):
        settings.stage_values("finetune_lora", {"quant_type": "fp4"})
    assert settings.stage_values("finetune_qlora", {"quant_type": "fp4", "lora_r": "8"})["lora_r"] == 8


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"image_head_lr": "1e-3", "tune_image_head": "false"}, "--image_head_lr .* without --tune_image_head true"),
        (
            {"language_model_lr": "1e-3", "tune_language_model": "false"},
            "--language_model_lr .* without --tune_language_model true or --lora_enable true",
        ),
        ({"group_lengths": "true", "group_by_modality_length": "false"}, "--group_lengths .*--group_by_modality"),
        ({"gradient_checkpointing_kwargs": "{use_reentrant: true}"}, "--gradient_checkpointing_kwargs .*ing true"),
        (
            {"tune_language_model": "true", "lora_enable": "true"},
            "--tune_language_model .* --lora_enable false",
        ),
        ({"activation_checkpointing_kwargs": "{use_reentrant: true}"}, "--activation_checkpointing_kwargs .*ing true"),
        ({"ddp_static_graph": "true"}, "--ddp_static_graph .* without --deepspeed none"),
        ({"eval_every": "5"}, "--eval_every .* without --eval_data FILE"),
        ({"dataloader_prefetch_factor": "4"}, "--dataloader_prefetch_factor .* --dataloader_num_workers 1"),
        (
            {"lr_scheduler_type": "constant", "warmup_steps": "5", "warmup_ratio": "none"},
            "--warmup_steps .*with_warmup",
        ),
        ({"optim": "sgd", "adam_beta1": "0.8"}, "--adam_beta1 .* sgd"),
        ({"optim_args": "eps=1e-6"}, "optim_args eps=1e-6 .* adamw_torch; use --adam_beta1"),
        ({"optim": "sgd", "optim_args": "momentun=1"}, "optim_args: momentun .* expected some of momentum"),
        ({"do_train": "false"}, "do_train=false .* it always trains"),
        ({"head_num_layers": "3", "image_head": "flat"}, "--head_num_layers .* without --image_head depth"),
        ({"group_by_modality_length": "true", "packing": "true"}, "--group_by_modality_length .* --packing false"),
    ],
)
def test_a_flag_that_another_flag_makes_ineffective_is_rejected(given, message):
    with pytest.raises(UserError, match=message.replace(" .* ", " has no effect .*")):
        settings.stage_values("finetune", given)


@pytest.mark.parametrize(
    "given",
    [
        {"language_model_lr": "1e-3", "tune_language_model": "false", "lora_enable": "true"},
        {"group_by_modality_length": "false", "packing": "true"},
        {"image_head_lr": "none", "tune_image_head": "false"},
        {"gradient_checkpointing": "true", "gradient_checkpointing_kwargs": "{use_reentrant: true}"},
        {"activation_checkpointing": "true", "gradient_checkpointing_kwargs": "{use_reentrant: true}"},
        {"optim": "sgd", "optim_args": "momentum=0.9, nesterov=true"},
        {"dataloader_prefetch_factor": "4", "dataloader_num_workers": "2"},
        {"eval_data": "a.json", "eval_every": "5"},
        {"tune_language_model": "false", "lora_enable": "true"},
        {"head_num_layers": "3"},
        {"head_num_layers": "3", "image_head": "depth"},
    ],
)
def test_compatible_flags_are_accepted(given):
    settings.stage_values("finetune", given)


def test_flags_replace_settings_of_the_recipe_that_fit_only_its_data():
    notices = []
    values = settings.stage_values("finetune", {"data_path": ["a.json"]}, notices.append)
    assert "data_weights" not in values and "replaces the recipe's data_weights [26" in notices[0]
    values = settings.stage_values("finetune", {"group_by_modality_length": "true"}, notices.append)
    assert values["packing"] is False and notices[1].endswith("replaces the recipe's packing true")


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_without_a_gpu_must_be_asked_for(dtype, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)  # restored after the test
    config = StageConfig(model_name_or_path="m", data_path=["d.json"], output_dir=str(tmp_path), **{dtype: True})
    with pytest.raises(UserError, match=f"{dtype} is true, but no CUDA GPU is visible.*--use_cpu true"):
        prepare_processes(config)


def test_inputs_of_the_quickstart_are_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    notices = []
    for name in ("pretrain", "scenes/train"):
        (tmp_path / "outputs" / "quickstart" / name).mkdir(parents=True)
    values = settings.stage_values("finetune", {}, notices.append)
    assert values["model_name_or_path"] == "outputs/quickstart/pretrain" and "inputs of the quickstart" in notices[0]
    assert values["output_dir"] == "{workspace}/finetune"
    assert values["image_folder"] == ["outputs/quickstart/scenes/train"]
    given = settings.stage_values("finetune", {"workspace": "outputs"})
    assert given["model_name_or_path"] == "{workspace}/pretrain"
    (tmp_path / "outputs" / "pretrain").mkdir()
    assert settings.stage_values("finetune", {})["model_name_or_path"] == "{workspace}/pretrain"


def test_several_gpus_without_a_launcher_are_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr(StageConfig, "n_gpu", property(lambda self: 2))
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)  # restored after the test
    config = StageConfig(model_name_or_path="m", data_path=["d.json"], output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(UserError, match="2 GPUs are visible.*NPROC=N or torchrun.*CUDA_VISIBLE_DEVICES=0"):
        prepare_processes(config)


CONSTRUCT = """
import os
import torch
from accelerate.state import AcceleratorState, PartialState
from llava_ext.training.config import StageConfig
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

environment = dict(os.environ)
config = StageConfig(model_name_or_path="m", data_path=["d.json"], output_dir="out", deepspeed="zero3", bf16=True)
assert config.deepspeed == "zero3" and not os.path.exists("out")
assert dict(os.environ) == environment
assert not torch.distributed.is_initialized() and not is_deepspeed_zero3_enabled()
assert PartialState._shared_state == {} and AcceleratorState._shared_state == {}
"""


def test_constructing_a_config_has_no_side_effects(tmp_path):
    subprocess.run([sys.executable, "-c", CONSTRUCT], check=True, cwd=tmp_path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lr_scheduler_type": "cosin"}, "cosin is not a valid SchedulerType.*change the setting"),
        ({"optim_args": "x", "lr_scheduler_kwargs": "{a: 1}"}, "lr_scheduler_kwargs: {a: 1} is not valid JSON"),
        ({"deepspeed": "broken.json"}, "DeepSpeed configuration broken.json is not valid JSON"),
        ({"deepspeed": "list.json"}, "DeepSpeed configuration list.json: expected a JSON object, got list"),
    ],
)
def test_values_that_transformers_or_deepspeed_rejects_are_user_errors(given, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)  # restored after the test
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    config = StageConfig(model_name_or_path="m", data_path=["d.json"], output_dir="out", use_cpu=True, **given)
    with pytest.raises(UserError, match=message):
        prepare_processes(config)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lora_r": 0, "lora_enable": True}, "lora_r must be at least 1, got 0"),
        ({"lora_dropout": 1.0, "lora_enable": True}, "lora_dropout must be at least 0 and below 1, got 1.0"),
        ({"prompt_dropout": -0.1}, "prompt_dropout must be at least 0 and below 1, got -0.1"),
        ({"bits": 8}, "bits must be 16, or 4 for QLoRA, got 8"),
        ({"save_total_limit": 0}, "save_total_limit must be at least 1, got 0"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be from 1 to"),
        ({"model_max_length": 10**30}, "model_max_length must be from 1 to"),
        ({"learning_rate": -1.0}, "learning_rate must be at least 0, got -1.0"),
        ({"seed": 2**32}, r"seed must be from 0 to 2\*\*32 - 1, got 4294967296"),
    ],
)
def test_a_value_outside_its_range_is_rejected(given, message):
    with pytest.raises(UserError, match=message):
        StageConfig(**given)


def test_settings_without_a_default_are_required():
    with pytest.raises(UserError, match="output_dir is not set; pass --output_dir"):
        check_required(StageConfig(model_name_or_path="m", data_path=["d.json"]))
    with pytest.raises(UserError, match="data_path is not set"):
        check_required(StageConfig(model_name_or_path="m", output_dir="out"))


@pytest.mark.parametrize("name", ["model_name_or_path", "output_dir", "data_path"])
def test_null_in_a_recipe_leaves_a_required_setting_unset(tmp_path, name):
    given = {"model_name_or_path": "m", "output_dir": "out", "data_path": ["d.json"], name: None}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(given))
    with pytest.raises(UserError, match=f"{name} is not set; pass --{name}"):
        check_required(StageConfig(**settings.stage_values(str(tmp_path / "r.yaml"), {})))
    (tmp_path / "r.yaml").write_text("bits: null")
    with pytest.raises(UserError, match="bits: expected a int, got nothing"):
        settings.stage_values(str(tmp_path / "r.yaml"), {})


def test_epochs_and_steps_replace_each_other():
    notices = []
    values = settings.stage_values("finetune", {"num_train_epochs": "1"}, notices.append)
    assert "max_steps" not in values and values["num_train_epochs"] == 1 and "max_steps 4600" in notices.pop()
    values = settings.stage_values("paper_finetune", {"max_steps": "7"}, notices.append)
    assert "num_train_epochs" not in values and values["max_steps"] == 7 and notices.pop()
    values = settings.stage_values("finetune", {"max_steps": "7", "num_train_epochs": "2"}, notices.append)
    assert values["max_steps"] == 7 and "takes precedence" in notices.pop()
    values = settings.stage_values("finetune", {"max_steps": "-1", "num_train_epochs": "2"}, notices.append)
    assert (values["max_steps"], values["num_train_epochs"], notices) == (-1, 2, [])
    values = settings.stage_values("finetune", {"warmup_steps": "5"}, notices.append)
    assert values["warmup_steps"] == 5 and "warmup_steps 5.0 replaces" in notices.pop()


def test_changes_are_rejected_applied_or_irrelevant():
    before = {"learning_rate": 1e-3, "max_steps": 4, "data_path": ["a.json"], "logging_steps": 1}
    assert resume_rules.compare(before, {**before, "logging_steps": 5, "save_steps": 9, "seed": 42}) == ([], [], [])
    now = {**before, "learning_rate": 1e-5, "tune_language_model": False, "max_steps": 8, "data_path": ["b.json"]}
    rejected, applied, moved = resume_rules.compare(before, now)
    assert {change.name for change in rejected} == {"learning_rate", "tune_language_model"}
    assert str(rejected[0]) == "learning_rate: 0.001 before, 1e-05 now"
    assert [change.name for change in applied] == ["max_steps"] and [change.name for change in moved] == ["data_path"]
    facts = {"data": "4 records, digest a"}
    flat = {"image_head": "flat"}
    assert resume_rules.compare({**flat, "head_num_layers": 3}, flat)[0] == []  # no effect in both
    assert resume_rules.content_changes(facts, facts, moved) == []  # the same records at another path
    assert resume_rules.content_changes({}, facts, moved) == moved
    one, other = {"weights": "a", "sha256": "b"}, {"weights": "a", "sha256": "c"}
    (model,) = resume_rules.content_changes(one, other, [])
    assert model.name == "model_name_or_path" and resume_rules.content_changes({"weights": "a"}, other, []) == []
    (different,) = resume_rules.content_changes(facts, {"data": "5 records, digest b"}, [])
    assert (different.name, different.before) == ("data", "4 records, digest a")


def test_an_unknown_flag_suggests_the_nearest():
    with pytest.raises(UserError, match="--learnin_rate; did you mean --learning_rate"):
        parse(["--recipe", "finetune", "--learnin_rate", "3"])
    with pytest.raises(UserError, match="unrecognized arguments: --learning"):  # abbreviations are not accepted
        parse(["--recipe", "finetune", "--learning", "3"])
    assert parse(["--recipe", "finetune", "--version", "v1", "--seed", "3"]) == ("finetune", {"seed": "3"})


def test_reporters_are_checked_first(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(UserError, match="wandb (has no API key|is not installed)"):
        check_reporting({"report_to": ["tensorboard", "wandb"]})
    if importlib.util.find_spec("wandb"):
        with pytest.raises(UserError, match="wandb has no API key"):
            check_reporting({"report_to": "all"})
    with pytest.raises(UserError, match="unknown reporter 'tensorbord'"):
        check_reporting({"report_to": "tensorbord"})
    monkeypatch.setattr("evotok_plugin.training.reporters.find_spec", lambda name: None)
    for name in ("tensorboard", "wandb"):
        with pytest.raises(UserError, match=f"{name} is not installed: `pip install {name}`"):
            check_reporters([name])
