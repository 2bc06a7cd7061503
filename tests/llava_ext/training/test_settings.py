"""Settings of a stage: every one takes effect or is refused, also on resume."""

from dataclasses import fields

import pytest
from transformers import TrainingArguments

from evotok_plugin.training.reporters import check_reporters
from llava_ext.training import settings
from llava_ext.training.config import StageConfig, check_reporting
from llava_ext.training.llava_flags import translate
from llava_ext.training.supported_arguments import SUPPORTED, UNSUPPORTED
from llava_ext.training.train import parse


def test_every_training_argument_is_honored_or_rejected():
    names = {field.name for field in fields(TrainingArguments)}
    assert not SUPPORTED & set(UNSUPPORTED) and SUPPORTED | set(UNSUPPORTED) == names


def test_every_setting_has_its_place_on_resume():
    tables = (settings.IRRELEVANT, settings.APPLIED, settings.BY_CONTENT, settings.REJECTED)
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
def test_a_setting_without_effect_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}=.* has no effect in a stage: "):
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


def test_flags_of_adapters_need_adapters():
    with pytest.raises(ValueError, match="--lora_r has no effect without --lora_enable true"):
        settings.stage_values("finetune", {"lora_r": "8"})
    with pytest.raises(ValueError, match="--quant_type has no effect without --bits 4"):
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
        ({"head_num_layers": "3", "image_head": "flat"}, "--head_num_layers .* without --image_head depth"),
        ({"group_by_modality_length": "true", "packing": "true"}, "--group_by_modality_length .* --packing false"),
    ],
)
def test_a_flag_that_another_one_switches_off_is_refused(given, message):
    with pytest.raises(ValueError, match=message.replace(" .* ", " has no effect .*")):
        settings.stage_values("finetune", given)


@pytest.mark.parametrize(
    "given",
    [
        {"language_model_lr": "1e-3", "tune_language_model": "false", "lora_enable": "true"},
        {"group_by_modality_length": "false", "packing": "true"},
        {"image_head_lr": "none", "tune_image_head": "false"},
        {"gradient_checkpointing": "true", "gradient_checkpointing_kwargs": "{use_reentrant: true}"},
        {"tune_language_model": "false", "lora_enable": "true"},
        {"head_num_layers": "3"},
        {"head_num_layers": "3", "image_head": "depth"},
    ],
)
def test_flags_that_agree_are_accepted(given):
    settings.stage_values("finetune", given)


def test_several_gpus_without_a_launcher_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(StageConfig, "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match="2 GPUs are visible.*NPROC=N or torchrun.*CUDA_VISIBLE_DEVICES=0"):
        StageConfig(model_name_or_path="m", data_path="d.json", output_dir=str(tmp_path), use_cpu=True)


def test_epochs_and_steps_replace_each_other():
    said = []
    values = settings.stage_values("finetune", {"num_train_epochs": "1"}, said.append)
    assert "max_steps" not in values and values["num_train_epochs"] == 1 and "max_steps 2900" in said.pop()
    values = settings.stage_values("paper_finetune", {"max_steps": "7"}, said.append)
    assert "num_train_epochs" not in values and values["max_steps"] == 7 and said.pop()
    values = settings.stage_values("finetune", {"max_steps": "7", "num_train_epochs": "2"}, said.append)
    assert values["max_steps"] == 7 and "takes precedence" in said.pop()
    values = settings.stage_values("finetune", {"max_steps": "-1", "num_train_epochs": "2"}, said.append)
    assert (values["max_steps"], values["num_train_epochs"], said) == (-1, 2, [])
    values = settings.stage_values("finetune", {"warmup_steps": "5"}, said.append)
    assert values["warmup_steps"] == 5 and "warmup_steps 5.0 replaces" in said.pop()


def test_changes_are_rejected_applied_or_of_no_influence():
    before = {"learning_rate": 1e-3, "max_steps": 4, "data_path": ["a.json"], "logging_steps": 1}
    assert settings.compare(before, {**before, "logging_steps": 5, "save_steps": 9, "seed": 42}) == ([], [], [])
    now = {**before, "learning_rate": 1e-5, "tune_language_model": False, "max_steps": 8, "data_path": ["b.json"]}
    rejected, applied, moved = settings.compare(before, now)
    assert {change.name for change in rejected} == {"learning_rate", "tune_language_model"}
    assert str(rejected[0]) == "learning_rate: 0.001 before, 1e-05 now"
    assert [change.name for change in applied] == ["max_steps"] and [change.name for change in moved] == ["data_path"]
    facts = {"data": "4 records, digest a"}
    flat = {"image_head": "flat"}
    assert settings.compare({**flat, "head_num_layers": 3}, flat)[0] == []  # without effect in both
    assert settings.content_changes(facts, facts, moved) == []  # the same records at another place
    assert settings.content_changes({}, facts, moved) == moved
    one, other = {"weights": "a", "sha256": "b"}, {"weights": "a", "sha256": "c"}
    (model,) = settings.content_changes(one, other, [])
    assert model.name == "model_name_or_path" and settings.content_changes({"weights": "a"}, other, []) == []
    (different,) = settings.content_changes(facts, {"data": "5 records, digest b"}, [])
    assert (different.name, different.before) == ("data", "4 records, digest a")


def test_llava_s_flags_are_understood_said_to_be_ignored_or_replaced():
    said = []
    line = (
        "--version v1 --mm_projector_type mlp2x_gelu --mm_vision_select_layer -2 --mm_use_im_start_end False "
        "--mm_use_im_patch_token False --image_aspect_ratio pad --evaluation_strategy no --lazy_preprocess True "
        "--per_device_eval_batch_size 4 --group_by_modality_length True --mm_projector_lr=2e-5 --data_path a b"
    )
    rest = translate(line.split(), said.append)
    assert rest == "--group_by_modality_length True --mm_projector_lr=2e-5 --data_path a b".split()
    assert len(said) == 9 and said[2].startswith("--mm_vision_select_layer -2: ")
    assert translate(["--tune_mm_mlp_adapter", "True"], said.append) == ["--tune_language_model", "false"]
    assert translate(["--freeze_backbone", "False"], said.append) == []
    for flag, value, instead in [
        ("pretrain_mm_mlp_adapter", "x.bin", "--model_name_or_path"),
        ("mm_projector_type", "linear", "mlp2x_gelu"),
        ("overwrite_output_dir", "True", "--overwrite true"),
        ("evaluation_strategy", "steps", "evaluate.sh"),
    ]:
        with pytest.raises(ValueError, match=f"--{flag} {value} of LLaVA is not supported; instead: .*{instead}"):
            translate([f"--{flag}", value], said.append)


def test_an_unknown_flag_suggests_the_nearest():
    with pytest.raises(ValueError, match="--learnin_rate; did you mean --learning_rate"):
        parse(["--recipe", "finetune", "--learnin_rate", "3"])
    with pytest.raises(ValueError, match="unrecognized arguments: --learning"):  # no abbreviations
        parse(["--recipe", "finetune", "--learning", "3"])
    assert parse(["--recipe", "finetune", "--version", "v1", "--seed", "3"]) == ("finetune", {"seed": "3"})


def test_reporters_are_checked_first(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(ValueError, match="wandb (has no API key|is not installed)"):
        check_reporting({"report_to": ["tensorboard", "wandb"]})
    with pytest.raises(ValueError, match="unknown reporter 'tensorbord'"):
        check_reporting({"report_to": "tensorbord"})
    monkeypatch.setattr("evotok_plugin.training.reporters.find_spec", lambda name: None)
    for name in ("tensorboard", "wandb"):
        with pytest.raises(ValueError, match=f"{name} is not installed: `pip install {name}`"):
            check_reporters([name])
