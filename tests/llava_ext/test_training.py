"""The real training command on tiny random models: DeepSpeed engine, resume, two processes, LoRA, bad input.

Every run is a forked child, so process groups and environment stay apart and libraries are imported once.
"""

import json
import multiprocessing
import os
import socket
import traceback
from queue import Empty

import pytest
import torch
import yaml
from safetensors.torch import load_file

from llava_ext.checkpointing import load_model
from llava_ext.training import train
from llava_ext.training.checkpoints import MARKER, RunShape, find_resumable, finished_facts, is_complete


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _child(rank, world_size, port, function, arguments, queue):
    if world_size > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
        os.environ.update(LOCAL_WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        queue.put((rank, "ok", function(*arguments)))
    except BaseException as error:  # noqa: BLE001 - handed to the parent, which fails
        queue.put((rank, f"{type(error).__name__}: {error}", traceback.format_exc()))


def run_forked(function, *arguments, world_size=1):
    """Run `function` in forked ranks; returns rank 0's result or raises with its error's text."""
    context = multiprocessing.get_context("fork")
    queue, port = context.Queue(), _free_port()
    children = [
        context.Process(target=_child, args=(rank, world_size, port, function, arguments, queue))
        for rank in range(world_size)
    ]
    for child in children:
        child.start()
    results = []
    while len(results) < world_size:
        try:
            results.append(queue.get(timeout=2))
        except Empty:
            died = [child.exitcode for child in children if child.exitcode]
            if died:
                for child in children:
                    child.kill()
                raise RuntimeError(f"a rank died with exit code {died[0]}") from None
    for child in children:
        child.join(60)
    results.sort(key=lambda result: result[0])
    for rank, status, result in results:
        if status != "ok":
            raise RuntimeError(f"rank {rank}: {status}\n{result}")
    return results[0][2]


@pytest.fixture(scope="module")
def recipe(tiny_backbone_folder, tiny_evotok_folder, scene_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    text = [
        {"id": f"t{i}", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}
        for i in range(8)
    ]
    (folder / "text.json").write_text(json.dumps(text))
    values = {
        "model_name_or_path": str(tiny_backbone_folder),
        "vision_tower": str(tiny_evotok_folder),
        "data_path": [str(scene_folder / "train" / "finetune.json"), str(folder / "text.json")],
        "image_folder": str(scene_folder / "train"),
        "code_cache": str(folder / "codes"),
        "head_hidden_size": 32,
        "head_num_layers": 2,
        "head_num_heads": 2,
        "deepspeed": "zero2",
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "report_to": "none",
        "disable_tqdm": True,
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def run(recipe, output, **overrides):
    train.run_stage(str(recipe), {"output_dir": str(output), **overrides})


def metrics(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    """An uninterrupted run of four steps with everything but the tokenizer trained."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    run_forked(run, recipe, output)
    return output


def test_a_run_leaves_a_model_and_its_story(finished):
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


def test_an_interrupted_run_ends_where_the_uninterrupted_one_does(finished, recipe, tmp_path):
    """The newest checkpoint is damaged as by a kill while saving: the run goes on from the one before."""
    import shutil

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
    losses = [line["loss"] for line in metrics(finished) if "loss" in line]
    again = [line["loss"] for line in metrics(output)[len(metrics(finished)) :] if "loss" in line]
    assert again == losses[2:]


def test_another_number_of_processes_is_refused_with_the_way_out(finished):
    with pytest.raises(ValueError, match="written by 1 processes .* NPROC=1"):
        find_resumable(finished, RunShape(2, 2))


def test_stage_one_leaves_the_language_model_alone(recipe, tiny_backbone_folder, tmp_path):
    output = tmp_path / "pretrain"
    run_forked(_frozen_run, recipe, output)
    model, _ = load_model(output)
    before = load_file(tiny_backbone_folder / "model.safetensors")
    after = model.language_model.state_dict()
    for name, tensor in before.items():
        if name.startswith("model.layers"):
            assert torch.equal(tensor, after[name.removeprefix("model.")]), name


def _frozen_run(recipe, output):
    run(recipe, output, tune_language_model="false", max_steps=2, data_path=_only_images(recipe))


def _only_images(recipe):
    return [yaml.safe_load(recipe.read_text())["data_path"][0]]


def test_two_processes_with_different_kinds_of_batches(recipe, tmp_path):
    """One rank may read while the other has only text: gradients must still be reduced alike."""
    run_forked(run, recipe, tmp_path / "two", world_size=2)
    assert json.loads((tmp_path / "two" / "checkpoint-4" / MARKER).read_text())["world_size"] == 2
    load_model(tmp_path / "two")


def test_bf16_leaves_the_tokenizer_as_it_was(recipe, tiny_evotok_folder, tmp_path):
    """The engine casts what it trains; rounded codebooks would give other codes."""
    run_forked(_bf16_run, recipe, tmp_path / "bf16")
    model, _ = load_model(tmp_path / "bf16")
    for name, tensor in load_file(tiny_evotok_folder / "model.safetensors").items():
        assert torch.equal(tensor, model.vision_tower.state_dict()[name]), name
    saved = load_file(tmp_path / "bf16" / "model.safetensors")
    assert saved["language_model.layers.0.self_attn.q_proj.weight"].dtype == torch.bfloat16


def _bf16_run(recipe, output):
    run(recipe, output, bf16="true", max_steps=2)


def test_lora_is_folded_into_the_backbone(recipe, tiny_backbone_folder, tmp_path):
    run_forked(_lora_run, recipe, tmp_path / "lora")
    model, processor = load_model(tmp_path / "lora")
    assert not any("lora" in name for name, _ in model.named_parameters())
    before = load_file(tiny_backbone_folder / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    assert not torch.equal(before, model.language_model.layers[0].self_attn.q_proj.weight)


def _lora_run(recipe, output):
    run(recipe, output, lora_enable="true", lora_r=4, learning_rate=1e-2)


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
def test_bad_input_is_one_clear_line(recipe, tmp_path, flags, message):
    assert message in run_forked(_stderr_of_main, recipe, tmp_path / "out", flags)


def _stderr_of_main(recipe, output, flags):
    import contextlib
    import io

    captured = io.StringIO()
    base = [] if "--recipe" in flags else ["--recipe", str(recipe)]
    with contextlib.redirect_stderr(captured):
        assert train.main([*base, "--output_dir", str(output), *flags]) == 2
    last = captured.getvalue().strip().splitlines()[-1]
    assert last.startswith("error: "), captured.getvalue()
    return last


def test_an_unknown_recipe_key_suggests_the_near_one(recipe, tmp_path):
    values = yaml.safe_load(recipe.read_text()) | {"learning_rat": 1}
    path = tmp_path / "typo.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match="unknown key 'learning_rat'; did you mean 'learning_rate'"):
        run(path, tmp_path / "out")


def test_broken_images_are_counted_named_and_limited(recipe, scene_folder, tmp_path):
    import shutil

    broken = tmp_path / "images"
    shutil.copytree(scene_folder / "train", broken)
    (broken / "images" / "000003.png").write_bytes(b"not a picture")
    flags = ["--image_folder", str(broken), "--code_cache", str(tmp_path / "codes")]
    text = run_forked(_stderr_of_main, recipe, tmp_path / "strict", flags)
    assert "samples are unusable, over the limit of 0.10%" in text and "000003.png" in text
    run_forked(_tolerant_run, recipe, tmp_path / "tolerant", str(broken), str(tmp_path / "codes"))
    assert "000003.png" in (tmp_path / "tolerant" / "bad_samples.jsonl").read_text()


def _tolerant_run(recipe, output, images, cache):
    run(recipe, output, image_folder=images, code_cache=cache, max_bad_fraction=0.1, max_steps=1)
