"""The loss of an optimizer step: a mean over its text tokens plus one over its image positions.

It does not depend on how the step is divided into micro-batches, processes and packed rows.
"""

import json
import tempfile
from pathlib import Path

import pytest
import torch
import transformers
from stage_runs import run_forked, stage_exit, write_recipe

from evotok_plugin.common.recipes import recipe_values
from llava_ext.data.collators import Collator, PackedCollator
from llava_ext.data.packing import PackedDataset
from llava_ext.training import train
from llava_ext.training.config import StageConfig
from llava_ext.training.launch import prepare_processes
from llava_ext.training.trainer import EvoTokTrainer

LEARNING_RATE = 4.0  # of plain SGD: a step's change of the weights is this many times the gradient
SGD = {
    "optim": "sgd",
    "learning_rate": LEARNING_RATE,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0,
    "max_steps": 1,
    "prompt_dropout": 0.0,
    "save_strategy": "no",
    "logging_steps": 1,
    "deepspeed": "none",
}
# Samples per micro-batch, micro-batches, processes: 8 samples in total.
CUTS = {"8": (8, 1, 1), "4 x 2": (4, 2, 1), "1 x 8": (1, 8, 1), "1 x 4, two processes": (1, 4, 2)}
PACKED = {"packing": "true", "model_max_length": 128}


@pytest.fixture(scope="module")
def recipe(tiny_backbone_folder, tiny_evotok_folder, scene_folder, tmp_path_factory):
    """One long answer among short ones, and read and drawn images that some micro-batches lack."""
    folder = tmp_path_factory.mktemp("recipes")
    path = write_recipe(folder, tiny_backbone_folder, tiny_evotok_folder, scene_folder)
    rows = json.loads((scene_folder / "train" / "pretrain.json").read_text())
    drawing = [row for row in rows if "<image>" in row["conversations"][1]["value"]]
    reading = [row for row in rows if "<image>" in row["conversations"][0]["value"]]
    say = lambda text: {  # noqa: E731
        "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": text}]
    }
    mixed = [say("a red ring " * 20), say("yes"), drawing[0], say("no"), reading[0], say("ho"), drawing[1], reading[1]]
    (folder / "mixed.json").write_text(json.dumps(mixed))
    (folder / "seven.json").write_text(json.dumps([*mixed[:2], say("one"), say("two " * 9), say("three"), *mixed[5:]]))
    return path


@pytest.fixture(scope="module")
def mixed(recipe):
    return {"data_path": [str(recipe.parent / "mixed.json")]}


def prepare(recipe, overrides):
    output = tempfile.mkdtemp(dir=recipe.parent)
    config = StageConfig(**recipe_values(str(recipe), StageConfig, {"output_dir": output, **SGD, **overrides}))
    prepare_processes(config)
    transformers.set_seed(0)
    model, processor = train.build_model(config)
    dataset = train.build_dataset(config, model, processor)
    return config, train.make_trainable(model, config), processor, dataset


def gradient_of_the_joint_batch(recipe, overrides):
    """The gradient of one forward pass over all samples, and its losses."""
    config, model, processor, dataset = prepare(recipe, overrides)
    output = model.train()(**Collator(processor)([dataset[index] for index in range(len(dataset))]))
    loss = config.text_loss_weight * output.text_loss + config.image_loss_weight * output.image_loss
    loss.backward()
    named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    losses = {"text_loss": output.text_loss, "image_loss": output.image_loss, "loss": loss}
    return {name: weight.grad.numpy() for name, weight in named}, {name: float(x) for name, x in losses.items()}


def gradient_of_a_step(recipe, overrides):
    """The gradient computed from the change of the weights in one step of the real trainer, and its log."""
    config, model, processor, dataset = prepare(recipe, overrides)
    before = {name: w.detach().clone() for name, w in model.named_parameters() if w.requires_grad}
    trainer = EvoTokTrainer(
        model,
        config,
        train_dataset=PackedDataset(dataset) if config.packing else dataset,
        data_collator=(PackedCollator if config.packing else Collator)(processor),
        processing_class=processor,
        shape=train.RunShape(config.world_size),
    )
    trainer._save_checkpoint = lambda *_: None  # the test only needs the weights
    trainer.train()
    changes = {name: (w - model.get_parameter(name).detach().float()) / LEARNING_RATE for name, w in before.items()}
    lines = (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines() if config.process_index == 0 else []
    return {name: change.numpy() for name, change in changes.items()}, [json.loads(line) for line in lines]


def flat(gradient):
    return torch.cat([torch.from_numpy(gradient[name]).flatten() for name in sorted(gradient)]).double()


def check_same_gradient(found, expected):
    found, expected = flat(found), flat(expected)
    assert float(found @ expected / (found.norm() * expected.norm())) == pytest.approx(1, abs=1e-5)
    assert float(found.norm() / expected.norm()) == pytest.approx(1, abs=1e-4)


def step_overrides(cut, **more):
    samples, accumulation, _ = CUTS[cut]
    return {"per_device_train_batch_size": samples, "gradient_accumulation_steps": accumulation, **more}


@pytest.fixture(scope="module")
def joint(recipe, mixed):
    return run_forked(gradient_of_the_joint_batch, recipe, mixed)


@pytest.mark.parametrize("rows", [{}, PACKED], ids=["samples", "packed"])
@pytest.mark.parametrize("cut", CUTS)
def test_a_step_has_the_gradient_and_the_losses_of_its_joint_batch(recipe, mixed, joint, cut, rows):
    overrides = {**mixed, **rows, **step_overrides(cut)}
    found, lines = run_forked(gradient_of_a_step, recipe, overrides, world_size=CUTS[cut][2])
    check_same_gradient(found, joint[0])
    for name, loss in joint[1].items():
        assert lines[0][name] == pytest.approx(loss, abs=1e-4), name


@pytest.mark.parametrize("cut", ["1 x 8", "1 x 4, two processes"])
def test_deepspeed_averages_exactly_once(recipe, mixed, joint, cut):
    overrides = {**mixed, **step_overrides(cut, deepspeed="zero2", gradient_checkpointing="true")}
    found, lines = run_forked(gradient_of_a_step, recipe, overrides, world_size=CUTS[cut][2])
    check_same_gradient(found, joint[0])
    assert lines[0]["loss"] == pytest.approx(joint[1]["loss"], abs=1e-4)


def test_loss_weights_scale_the_means(recipe, mixed):
    weights = {**mixed, "text_loss_weight": 0.5, "image_loss_weight": 2.0}
    expected, losses = run_forked(gradient_of_the_joint_batch, recipe, weights)
    found, lines = run_forked(gradient_of_a_step, recipe, {**weights, **step_overrides("4 x 2")})
    check_same_gradient(found, expected)
    assert lines[0]["loss"] == pytest.approx(losses["loss"], abs=1e-4)


def test_a_step_without_drawings_on_any_process(recipe, scene_folder, tmp_path):
    """A mean over no image positions must not become NaN."""
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    (tmp_path / "text.json").write_text(json.dumps([{"conversations": turns}, {"conversations": turns}]))
    overrides = {"data_path": [str(tmp_path / "text.json")], "tune_image_head": "false", "tune_projectors": "false"}
    expected, losses = run_forked(gradient_of_the_joint_batch, recipe, overrides)
    found, lines = run_forked(gradient_of_a_step, recipe, {**overrides, "per_device_train_batch_size": 1}, world_size=2)
    check_same_gradient(found, expected)
    assert "image_loss" not in lines[0] and lines[0]["loss"] == pytest.approx(losses["loss"], abs=1e-4)


def test_tokens_of_the_shorter_last_step_of_an_epoch_have_the_same_weight(recipe):
    """Of seven samples the second step has three.

    With learning rate 0 both steps have the same weights, so the losses of the run equal those of the joint batch.
    """
    data = {"data_path": [str(recipe.parent / "seven.json")], "learning_rate": 0.0}
    _, expected = run_forked(gradient_of_the_joint_batch, recipe, data)
    cut = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "logging_steps": 2}
    _, lines = run_forked(gradient_of_a_step, recipe, {**data, **cut, "max_steps": -1, "num_train_epochs": 1})
    for name, loss in expected.items():
        assert lines[0][name] == pytest.approx(loss, abs=1e-4), name
    assert lines[-1]["train_loss"] == pytest.approx(expected["loss"], abs=1e-4)


@pytest.mark.parametrize("rows", [{}, {**PACKED, "model_max_length": 160}], ids=["samples", "packed"])
def test_samples_that_do_not_divide_among_the_processes_are_learned_once(recipe, mixed, rows):
    """Seven samples, or an odd number of rows, on two processes."""
    data = mixed if rows else {"data_path": [str(recipe.parent / "seven.json")]}
    expected, losses = run_forked(gradient_of_the_joint_batch, recipe, data)
    overrides = {**data, **rows, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    found, lines = run_forked(gradient_of_a_step, recipe, overrides, world_size=2)
    check_same_gradient(found, expected)
    assert lines[0]["loss"] == pytest.approx(losses["loss"], abs=1e-4)


# Groups without samples ---------------------------------------------------------------------------------------


@pytest.fixture
def only(recipe, scene_folder, tmp_path):
    """`only(kind)` writes a data set that only reads images, or only draws."""
    rows = json.loads((scene_folder / "train" / "pretrain.json").read_text())
    turn = {"read": 0, "draw": 1}

    def write(kind):
        path = tmp_path / f"{kind}.json"
        path.write_text(json.dumps([row for row in rows if "<image>" in row["conversations"][turn[kind]]["value"]]))
        return str(path)

    return write


@pytest.mark.parametrize("head", ["depth", "flat"])
def test_a_head_without_drawings_stops_the_run_before_the_first_step(recipe, only, tmp_path, head):
    flags = ["--data_path", only("read"), "--tune_language_model", "false", "--image_head", head]
    code, line = run_forked(stage_exit, recipe, tmp_path / "out", flags)
    assert code == 2 and "image_head" in line and "18 read, 0 draw, 0 text" in line
    assert ("write_projector" in line) == (head == "depth")
    assert "--tune_image_head false" in line and "--caption_task draw or both" in line
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_the_named_remedy_lets_the_other_groups_train(recipe, only, tmp_path):
    overrides = {"data_path": [only("read")], "tune_language_model": "false", "max_steps": 1}
    overrides |= {"tune_write_projector": "false", "tune_image_head": "false"}

    def trained():
        config, model, _, _ = prepare(recipe, overrides)
        return {name.split(".")[0] for name, weight in model.named_parameters() if weight.requires_grad}

    assert run_forked(trained) == {"read_projector", "new_token_rows"}


def test_a_read_projector_without_images_to_read_is_named(recipe, only, tmp_path):
    code, line = run_forked(stage_exit, recipe, tmp_path / "out", ["--data_path", only("draw")])
    assert code == 2 and "read_projector would train" in line and "--tune_read_projector false" in line


def test_each_group_without_samples_has_its_own_remedy(recipe, tmp_path):
    flags = ["--data_path", str(recipe.parent / "text.json")]
    code, line = run_forked(stage_exit, recipe, tmp_path / "out", flags)
    reads, draws = line.split(". ", 1)[1].split(". ")
    assert code == 2 and reads.startswith('For read_projector, add data with images in "human" turns')
    assert draws.startswith("For write_projector and image_head, add data with") and reads.endswith("projector false")
    assert draws.endswith("or pass --tune_write_projector false --tune_image_head false.")


def test_conversations_that_draw_and_read_train_both_groups(recipe, only, tmp_path):
    rows = json.loads(Path(only("read")).read_text())
    for row in rows:
        row["image"] = [row["image"], row["image"]]
        row["conversations"][1]["value"] = "<image>"
    (tmp_path / "both.json").write_text(json.dumps(rows))
    assert run_forked(_prepared, recipe, {"data_path": [str(tmp_path / "both.json")]}) == {
        "text": 0,
        "read": 0,
        "draw": 18,
    }


def _prepared(recipe, overrides):
    """The number of samples of each kind of a run that passes the checks."""
    return prepare(recipe, overrides)[-1].count_kinds()


def test_a_loss_with_weight_0_does_not_train_the_head(recipe, tmp_path):
    code, line = run_forked(stage_exit, recipe, tmp_path / "out", ["--image_loss_weight", "0"])
    assert code == 2 and "image_head would train" in line and "image_loss_weight is 0" in line


def test_a_group_with_learning_rate_0_needs_no_samples(recipe, only):
    assert run_forked(_prepared, recipe, {"data_path": [only("draw")], "mm_projector_lr": 0.0})["read"] == 0


@pytest.mark.parametrize("stage", ["pretrain", "finetune", "interleaved"])
def test_the_embedded_data_have_samples_for_every_group(recipe, scene_folder, stage):
    assert run_forked(_prepared, recipe, {"data_path": [str(scene_folder / "train" / f"{stage}.json")]})["draw"] > 0
