"""Held-out samples in the course of training: their losses are those of the model, and training does not change."""

import json

import pytest
import torch
from PIL import Image
from stage_runs import run, run_forked, write_recipe

from llava_ext.data.collators import Collator
from llava_ext.model_folder import load_model
from llava_ext.training import train
from llava_ext.training.build_data import build_heldout
from llava_ext.training.config import StageConfig
from llava_ext.training.launch import prepare_processes
from llava_ext.training.settings import stage_values

FIELDS = ("loss", "text_loss", "image_loss")


@pytest.fixture(scope="module")
def recipe(tiny_backbone_folder, tiny_evotok_folder, scene_folder, tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("recipes"), tiny_backbone_folder, tiny_evotok_folder, scene_folder)


@pytest.fixture(scope="module")
def heldout(recipe, scene_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("heldout") / "heldout.json"
    path.write_text(json.dumps(json.loads((scene_folder / "train" / "pretrain.json").read_text())[:7]))
    return str(path)


def entries(output, name):
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if name in line}


def losses_of(recipe, folder, heldout, output):
    """The losses of a saved model on the held-out samples, one sample at a time."""
    settings = {"eval_data": [heldout], "output_dir": str(output), "deepspeed": "none"}
    config = StageConfig(**stage_values(str(recipe), settings))
    prepare_processes(config)
    model, processor = load_model(folder)
    data, collate = build_heldout(config, model, processor), Collator(processor)
    sums = torch.zeros(2, 2)
    with torch.no_grad():
        for index in range(len(data.dataset)):
            found = model(**collate([data.dataset[index]]))
            counts = torch.stack([found.num_text_tokens, found.num_image_positions]).float()
            sums += torch.stack([torch.stack([found.text_loss, found.image_loss]) * counts, counts])
    return (sums[0] / sums[1]).tolist()


@pytest.mark.parametrize(("engine", "world_size"), [("none", 1), ("zero2", 2)])
def test_held_out_losses_are_those_of_the_model(recipe, heldout, tmp_path, engine, world_size):
    given = {"eval_data": [heldout], "eval_every": 3, "deepspeed": engine, "report_to": "tensorboard"}
    run_forked(run, recipe, tmp_path / "run", given, world_size=world_size)
    found = entries(tmp_path / "run", "eval_loss")
    assert list(found) == [3, 4]
    expected = run_forked(losses_of, recipe, tmp_path / "run", heldout, tmp_path / "other")
    assert [found[4]["eval_text_loss"], found[4]["eval_image_loss"]] == pytest.approx(expected, abs=2e-4)
    names = [path.name for path in sorted((tmp_path / "run" / "samples").iterdir())]
    assert names == ["step_000003.png", "step_000004.png"]
    assert Image.open(tmp_path / "run" / "samples" / names[0]).width > 4 * 48
    (events,) = (tmp_path / "run" / "tensorboard").rglob("events.out.tfevents.*")
    assert b"drawings" in events.read_bytes() and b"eval/text_loss" in events.read_bytes()


def test_evaluating_does_not_change_the_training(recipe, heldout, tmp_path):
    run_forked(run, recipe, tmp_path / "a", {"deepspeed": "none"})
    run_forked(run, recipe, tmp_path / "b", {"deepspeed": "none", "eval_data": [heldout], "eval_every": 1})
    a, b = (entries(tmp_path / name, "loss") for name in "ab")
    assert list(b) == [1, 2, 3, 4]
    for step, entry in a.items():
        assert [b[step].get(name) for name in FIELDS] == [entry.get(name) for name in FIELDS]


def test_missing_held_out_data_is_reported_before_anything_is_loaded(recipe, tmp_path):
    with pytest.raises(Exception, match="data file nowhere.json does not exist"):
        train.check_data_paths(StageConfig(**stage_values(str(recipe), {"eval_data": ["nowhere.json"]})))
