"""Reinforcement by its real command on tiny random models: engines, processes, resuming, signals, wrong input."""

import json
import shutil
import signal

import pytest
import torch
import yaml
from safetensors.torch import load_file
from stage_runs import exit_codes_when, reinforce, run_forked, stage_exit

from evotok_plugin.errors import UserError
from llava_ext.model_folder import load_model
from llava_ext.training.checkpoints import checkpoints
from llava_ext.training.reinforcement import train
from llava_ext.training.reinforcement.config import ReinforceConfig
from llava_ext.training.settings import stage_values

LORA = {"lora_enable": "true", "lora_r": 4}
ZERO2 = {"deepspeed": "zero2"}
NO_REPLAY = {"replay_weight": 0.0, "weight_decay": 0.0}


@pytest.fixture(scope="module")
def base(tiny_mllm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    for part in tiny_mllm:
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def recipe(base, scene_folder, tmp_path_factory):
    """A recipe of four steps of two prompts that replays a few scenes."""
    folder = tmp_path_factory.mktemp("recipes")
    rows = [{"prompt": f"a {color} {tag}", "tag": tag} for tag in ("ring", "cross") for color in ("red", "blue")]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "heldout.txt").write_text("a blue ring\ntwo green squares\n")
    values = {
        "model_name_or_path": str(base),
        "prompts": [str(folder / "prompts.jsonl")],
        "rewards": {"toy_rewards:brightness": 1.0},
        "data_path": [str(scene_folder / "train" / "finetune.json")],
        "image_folder": str(scene_folder / "train"),
        "code_cache": str(folder / "codes"),
        "prompts_per_step": 2,
        "drawings_per_prompt": 3,
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "report_to": "none",
        "disable_tqdm": True,
    }
    path = folder / "reinforce.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def lines_of(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def weights_of(output):
    whole = output / "model.safetensors"
    return load_file(whole if whole.exists() else output / "adapter" / "adapter_model.safetensors")


def assert_same_weights(one, other):
    expected, found = weights_of(one), weights_of(other)
    assert set(expected) == set(found)
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


OBSERVED = {"evaluate_every": 2, "evaluation_prompts": 2, "sample_every": 2, "second_judge": "toy_rewards:equal"}


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "whole"
    heldout = {"heldout_prompts": [str(recipe.parent / "heldout.txt")]}
    run_forked(reinforce, recipe, output, {"kl_weight": 0.1, **OBSERVED, **heldout})
    return output


def test_a_run_writes_a_model_its_metrics_and_pictures(finished, base):
    model, processor = load_model(finished)
    assert len(model.generate_images("a ring", processor)) == 1
    changed = {name for name, tensor in weights_of(finished).items() if not torch.equal(tensor, weights_of(base)[name])}
    assert any("image_head" in name for name in changed) and any("read_projector" in name for name in changed)
    assert not [name for name in changed if "vision_tower" in name]
    steps = [line for line in lines_of(finished) if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    for name in ("reward", "reward/toy_rewards:brightness", "reward/tag/ring", "reward/tag/cross", "kl", "entropy",
                 "entropy/level_0", "share_mixed", "diversity", "grad_norm", "policy_loss",
                 "drawing_seconds", "judging_seconds", "learning_seconds"):  # fmt: skip
        assert all(name in line for line in steps), name
    assert steps[0]["kl"] == 0 < steps[-1]["kl"] and steps[0]["share_mixed"] == 1
    last = steps[-1]
    replayed = last["text_loss"] + last.get("image_loss", 0.0)  # a batch is of one kind
    assert last["loss"] == pytest.approx(last["policy_loss"] + 0.1 * last["kl"] + replayed, abs=1e-4)
    observed = [line for line in lines_of(finished) if "heldout/reward" in line]
    assert [line["step"] for line in observed] == [0, 2, 4]
    assert all(line["trained/second_judge"] == line["heldout/second_judge"] == 1 for line in observed)
    names = [path.name for path in sorted((finished / "samples").iterdir())]
    assert names == ["step_000000.png", "step_000002.png", "step_000004.png"]


def test_the_reading_of_the_starting_model_is_a_second_judge(recipe, tmp_path):
    pytest.importorskip("llava_ext.generation.reading_score")
    settings = {**NO_REPLAY, "second_judge": "reading", "evaluate_every": 1, "max_steps": 1}
    run_forked(reinforce, recipe, tmp_path / "out", settings)
    observed = [line for line in lines_of(tmp_path / "out") if "trained/second_judge" in line]
    assert [line["step"] for line in observed] == [0, 1]


@pytest.mark.parametrize(
    "settings",
    [
        {"kl_weight": 0.1},
        {"replay_weight": 0.0, **ZERO2},
        pytest.param({"kl_weight": 0.1, **LORA}, marks=pytest.mark.slow),
        pytest.param({"kl_weight": 0.1, **LORA, **ZERO2}, marks=pytest.mark.slow),
    ],
    ids=["replay", "zero2", "lora", "lora zero2"],
)
def test_a_resumed_run_equals_the_uninterrupted_one(recipe, tmp_path, settings):
    run_forked(reinforce, recipe, tmp_path / "whole", settings)
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    run_forked(reinforce, recipe, tmp_path / "resumed", {**settings, **OBSERVED})
    assert_same_weights(tmp_path / "whole", tmp_path / "resumed")


def test_a_terminated_run_saves_its_step_and_is_resumed(recipe, finished, tmp_path):
    output = tmp_path / "run"

    def happened():
        return (output / "metrics.jsonl").exists() and '"step": 1' in (output / "metrics.jsonl").read_text()

    settings = {"kl_weight": 0.1}
    assert exit_codes_when(happened, signal.SIGTERM, reinforce, recipe, output, settings) == [128 + signal.SIGTERM]
    assert checkpoints(output) and not (output / "model.safetensors").exists()
    run_forked(reinforce, recipe, output, settings)
    assert_same_weights(finished, output)


SGD = {"optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": 0.1, "max_grad_norm": 0.0}


@pytest.mark.parametrize("engine", [{}, ZERO2], ids=["ddp", "zero2"])
def test_two_processes_equal_one(recipe, tmp_path, engine):
    settings = {**NO_REPLAY, **SGD, "kl_weight": 0.5, "max_steps": 2, "drawing_batch_size": 6}
    run_forked(reinforce, recipe, tmp_path / "one", {**settings, "prompts_per_step": 4})
    parts = {"prompts_per_step": 4, "drawing_batch_size": 3}  # two parts per process
    run_forked(reinforce, recipe, tmp_path / "two", {**settings, **parts, **engine}, world_size=2)
    expected, found = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-4, msg=name)
    one, two = lines_of(tmp_path / "one")[1], lines_of(tmp_path / "two")[1]
    for name in ("reward", "kl", "entropy", "policy_loss", "diversity", "loss", "reward/tag/ring"):
        assert one[name] == pytest.approx(two[name], abs=2e-5), name


@pytest.mark.slow
def test_two_processes_replay(recipe, tmp_path):
    """The gradients of drawings and of replayed samples are exchanged together, with both engines."""
    settings = {**SGD, "kl_weight": 0.5, "max_steps": 2, "per_device_train_batch_size": 2, "drawing_batch_size": 3}
    settings |= {"prompts_per_step": 4, "gradient_accumulation_steps": 2}
    run_forked(reinforce, recipe, tmp_path / "ddp", settings, world_size=2)
    run_forked(reinforce, recipe, tmp_path / "zero2", {**settings, **ZERO2}, world_size=2)
    expected, found = weights_of(tmp_path / "ddp"), weights_of(tmp_path / "zero2")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-4, msg=name)


def test_equal_rewards_do_not_change_the_weights(recipe, base, tmp_path):
    settings = {**NO_REPLAY, "rewards": {"toy_rewards:equal": 1.0}, "max_steps": 2}
    run_forked(reinforce, recipe, tmp_path / "out", settings)
    assert_same_weights(base, tmp_path / "out")
    assert all(line["share_mixed"] == 0 for line in lines_of(tmp_path / "out") if "share_mixed" in line)


def test_left_out_groups_do_not_change_the_step(recipe, tmp_path):
    """Groups of equal rewards are only computed in steps that are logged."""
    settings = {**NO_REPLAY, "rewards": {"toy_rewards:first_prompt": 1.0}, "max_steps": 2, **SGD}
    run_forked(reinforce, recipe, tmp_path / "logged", settings)
    run_forked(reinforce, recipe, tmp_path / "other", {**settings, "logging_steps": 5})
    expected, found = weights_of(tmp_path / "logged"), weights_of(tmp_path / "other")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-4, msg=name)


def test_adapters_learn_from_drawings(recipe, tmp_path):
    run_forked(reinforce, recipe, tmp_path / "out", {**LORA, "replay_weight": 0.0, "kl_weight": 0.1, "max_steps": 3})
    model, processor = load_model(tmp_path / "out")
    assert len(model.generate_images("a ring", processor)) == 1
    steps = [line for line in lines_of(tmp_path / "out") if "loss" in line]
    assert steps[0]["kl"] == 0 < steps[-1]["kl"]
    adapter = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert any(".lora_B" in name and tensor.abs().max() > 0 for name, tensor in adapter.items())


def test_a_reward_that_fails_ends_the_run_and_keeps_its_checkpoint(recipe, tmp_path):
    flags = ["--rewards", "{toy_rewards:FailsInTheThirdStep: 1.0}", "--replay_weight", "0"]
    code, line = run_forked(stage_exit, recipe, tmp_path / "out", flags, train.main)
    assert code == 2 and "step 3: the reward failed with" in line and "the judge broke" in line
    assert "the last checkpoint is kept" in line
    assert [folder.name for folder in checkpoints(tmp_path / "out")] == ["checkpoint-2"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rewards", "{toy_rewards:not_a_number: 1.0}"], "step 1: reward toy_rewards:not_a_number: the score of"),
        (["--rewards", "{toy_rewards:unsure: 1.0}"], "step 1: prompt 'a .*' cannot be judged"),
        (["--rewards", "{nonsense: 1.0}"], "unknown reward 'nonsense'; known are"),
        (["--rewards", "{toy_rewards:equal: 0}"], "expected a finite weight other than 0"),
        (["--drawings_per_prompt", "1"], "drawings_per_prompt must be at least 2, got 1"),
        (["--prompts", "missing.txt"], "prompts file missing.txt cannot be read"),
        (["--deepspeed", "zero3"], "pass --deepspeed zero2, not zero3"),
        (["--max_steps", "-1"], "pass --max_steps N"),
        (["--drawing_temperature", "0"], "drawing_temperature must be above 0"),
        (["--kl_weight", "-1"], "kl_weight must be at least 0"),
    ],
)
def test_wrong_settings_are_user_errors(recipe, tmp_path, flags, message):
    import re

    code, line = run_forked(stage_exit, recipe, tmp_path / "out", flags, train.main)
    assert code == 2 and re.search(message, line), line
    assert not checkpoints(tmp_path / "out")


def test_a_text_model_is_rejected(recipe, tiny_backbone_folder, tmp_path):
    flags = ["--model_name_or_path", str(tiny_backbone_folder)]
    code, line = run_forked(stage_exit, recipe, tmp_path / "out", flags, train.main)
    assert code == 2 and "holds a qwen2 model, which does not draw yet" in line


def test_prompts_must_divide_among_the_processes(recipe, tmp_path):
    with pytest.raises(RuntimeError, match="prompts_per_step 3 must be a multiple of the number of processes, 2"):
        run_forked(reinforce, recipe, tmp_path / "out", {"prompts_per_step": 3}, world_size=2)


def test_other_prompts_or_rewards_are_not_resumed(recipe, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    shutil.copy(finished / "recipe.yaml", tmp_path / "recipe.yaml")
    (tmp_path / "other.txt").write_text("a ring\n")
    flags = ["--prompts", str(tmp_path / "other.txt"), "--max_steps", "6"]
    code, line = run_forked(stage_exit, tmp_path / "recipe.yaml", tmp_path / "out", flags, train.main)
    assert code == 2 and "prompts: 4 prompts, digest" in line
    flags = ["--rewards", "{toy_rewards:equal: 1.0}", "--max_steps", "6"]
    code, line = run_forked(stage_exit, tmp_path / "recipe.yaml", tmp_path / "out", flags, train.main)
    assert code == 2 and "rewards: {'toy_rewards:brightness': 1.0} before" in line


def test_settings_that_only_observe_may_change(finished, tmp_path):
    from llava_ext.training.resume_rules import compare

    before = yaml.safe_load((finished / "recipe.yaml").read_text())
    now = {**before, "sample_every": 7, "evaluate_every": 3, "second_judge": None, "heldout_prompts": []}
    assert compare(before, now, ReinforceConfig) == ([], [], [])


def test_every_added_setting_has_a_rule_for_resuming():
    from dataclasses import fields

    from llava_ext.training.config import RESUME, StageConfig

    inherited = {field.name for field in fields(StageConfig)}
    rules = {field.name: field.metadata.get(RESUME) for field in fields(ReinforceConfig) if field.name not in inherited}
    assert rules and set(rules.values()) == {"rejected", "by_content", "irrelevant"}


def test_prompts_of_the_command_line_replace_the_data_of_the_embedded_default():
    notices = []
    values = train.read_values("reinforce", {"prompts": ["p.txt"]}, notices.append)
    assert "data_path" not in values and "heldout_prompts" not in values and len(notices) == 2
    given = {"prompts": ["p.txt"], "data_path": ["d.json"]}
    assert train.read_values("reinforce", given, notices.append)["data_path"] == ["d.json"]
    assert ReinforceConfig(**stage_values("reinforce", {}, schema=ReinforceConfig)).replays


def test_required_settings_are_named(base):
    from llava_ext.training.config import check_required

    given = {"model_name_or_path": str(base), "max_steps": 1, "output_dir": "o"}
    with pytest.raises(UserError, match="prompts is not set; pass --prompts"):
        check_required(ReinforceConfig(**given))
    given["prompts"] = ["p"]
    with pytest.raises(UserError, match="rewards is not set; pass --rewards"):
        check_required(ReinforceConfig(**given))
    check_required(ReinforceConfig(**given, rewards={"a": 1.0}))
