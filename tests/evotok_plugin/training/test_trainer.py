"""Training of the tokenizer: steps, resumption, processes, output folders."""

import errno
import json
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import fields

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from evotok_plugin import EvoTokConfig, EvoTokModel
from evotok_plugin.cli import main
from evotok_plugin.commands.train import training_values
from evotok_plugin.common.processes import Processes
from evotok_plugin.common.recipes import as_plain
from evotok_plugin.data.images import open_picture
from evotok_plugin.errors import UserError
from evotok_plugin.metrics.codes import CodeUsage
from evotok_plugin.teacher import load_recorded_teacher, load_teacher, teacher_features
from evotok_plugin.training import output
from evotok_plugin.training.checkpoints import checkpoints, owned_folder
from evotok_plugin.training.config import TokenizerTrainingConfig
from evotok_plugin.training.monitor import LossWatch, collapsed_levels
from evotok_plugin.training.output import TokenizerOutput
from evotok_plugin.training.teacher import captioned_images, train_teacher
from evotok_plugin.training.trainer import TokenizerTrainer
from evotok_plugin.training.weights_ema import WeightsEMA


@pytest.fixture(scope="module")
def teacher_folder(scene_folder, tiny_tokenizer_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    train_teacher(scene_folder / "train", tiny_tokenizer_folder, folder, max_steps=2, batch_size=8)
    return folder


def config(scene_folder, output, **options):
    values = dict(
        data=[str(scene_folder / "train")], output_dir=str(output), preset="tiny", max_steps=4, batch_size=4,
        learning_rate=1e-3, lpips_weight=0, gan_weight=0, semantic_weight=0, kmeans_images=8, augment=False,
        val_fraction=0.1, val_every=2, save_every=2, log_every=1,
    )  # fmt: skip
    return TokenizerTrainingConfig(**{**values, **options})


def test_training_lowers_the_loss_and_reports_it(scene_folder, teacher_folder, tmp_path):
    settings = {"max_steps": 25, "val_every": 25, "save_every": 25, "semantic_weight": 0.1, "pixel_weight": 20}
    TokenizerTrainer.open(config(scene_folder, tmp_path, teacher=str(teacher_folder), **settings)).run()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    pixel = [line["pixel"] for line in lines if "pixel" in line]
    assert sum(pixel[-5:]) < 0.7 * sum(pixel[:5])
    final = next(line for line in lines if "val_psnr" in line)
    assert final["step"] == 25 and -1 <= final["val_semantic_cosine"] <= 1
    assert (tmp_path / "validation_0000025.png").is_file() and list((tmp_path / "tensorboard").iterdir())
    assert isinstance(EvoTokModel.from_pretrained(tmp_path), EvoTokModel)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gan_weight": 0.5, "gan_start": 1, "gan_adaptive": True, "warmup_steps": 3, "cosine_decay": True},
        {"augment": True, "num_workers": 2, "weights_ema": 0.9, "model": {"level_dropout": 0.5}},
        {"weights_ema": 0.9, "model": {"quantizer": "simvq", "quantizer_gradient": "rotation", "level_dropout": 0.5}},
        {"weights_ema": 0.9, "model": {"quantizer": "fsq", "level_dropout": 0.5}},
        {"model": {"quantizer_gradient": "rotation"}},
    ],
)
def test_two_and_two_resumed_steps_equal_four(scene_folder, tmp_path, options):
    TokenizerTrainer.open(config(scene_folder, tmp_path / "whole", **options)).run()
    half = TokenizerTrainer.open(config(scene_folder, tmp_path / "parts", **options))
    original, stopped_at = half.save_checkpoint, []

    def stop_after_two():
        original()
        stopped_at.append(half.step)
        raise KeyboardInterrupt

    half.save_checkpoint = stop_after_two
    with pytest.raises(KeyboardInterrupt):
        half.run()
    assert stopped_at == [2]
    torch.manual_seed(99)
    TokenizerTrainer.open(config(scene_folder, tmp_path / "parts", **options)).run()
    for file in ("model.safetensors", "checkpoint-000000004.safetensors"):
        whole, parts = load_file(tmp_path / "whole" / file), load_file(tmp_path / "parts" / file)
        assert whole.keys() == parts.keys()
        for name, tensor in whole.items():
            assert torch.equal(tensor, parts[name]), (file, name)


def test_the_constructor_changes_nothing(scene_folder, tmp_path):
    settings = config(scene_folder, tmp_path / "run", max_steps=1)
    TokenizerTrainer.open(settings).run()
    (tmp_path / "run" / ".replaced").mkdir()  # as after a kill; `open` may remove it
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    processes = Processes(0, 1, torch.device("cpu"))
    output = TokenizerOutput(tmp_path / "run", settings, processes)
    random_state = torch.get_rng_state()
    torch.manual_seed(settings.seed)
    trainer = TokenizerTrainer(settings, processes, output)
    torch.set_rng_state(random_state)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    weights = TokenizerTrainer.open(settings).model.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in trainer.model.state_dict().items())


def test_a_run_without_held_out_images_has_no_validation_figures(scene_folder, tmp_path):
    trainer = TokenizerTrainer.open(config(scene_folder, tmp_path, val_fraction=0.0))
    assert trainer.validate() == {} and not list(tmp_path.glob("validation_*"))


def test_held_out_images_that_are_all_broken_are_an_error(scene_folder, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no image")
    options = {"val_data": [str(tmp_path / "broken")], "val_fraction": 0.01, "max_bad_fraction": 1.0}
    trainer = TokenizerTrainer.open(config(scene_folder, tmp_path / "run", **options))
    with pytest.raises(UserError, match="none of the 1 images to validate on can be read"):
        trainer.validate()


def test_a_loss_that_is_nan_names_its_term(scene_folder, tmp_path):
    trainer = TokenizerTrainer.open(config(scene_folder, tmp_path))
    with torch.no_grad():
        trainer.model.pixel_decoder.conv_out.bias.fill_(float("nan"))
    with pytest.raises(UserError, match="step 0: the pixel loss is nan"):
        trainer.run()


def settings_as_flags(settings):
    flags = []
    for name, value in as_plain(settings).items():
        if value is not None:
            flags += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return flags


# The command, which sends a signal to itself as soon as its first checkpoint is written.
STOPPED_AT_A_CHECKPOINT = """
import os, sys
from evotok_plugin import cli
from evotok_plugin.training import run_state

write, number = run_state.write_checkpoint, int(sys.argv.pop(1))

def write_and_signal(*arguments):
    path = write(*arguments)
    run_state.write_checkpoint = write
    os.kill(os.getpid(), number)
    return path

run_state.write_checkpoint = write_and_signal
sys.exit(cli.main(sys.argv[1:]))
"""


def run_until_a_checkpoint(settings, number):
    """Run the command in a process that gets a signal at its first checkpoint; returns exit code and output."""
    command = [sys.executable, "-c", STOPPED_AT_A_CHECKPOINT, str(int(number)), "train", *settings_as_flags(settings)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_stopped_run_resumes_to_the_same_end(scene_folder, tmp_path, number, code):
    options = {"max_steps": 60, "save_every": 7, "val_every": 60, "log_every": 60, "num_workers": 1}

    settings = config(scene_folder, tmp_path / "parts", **options)
    returned, output_text = run_until_a_checkpoint(settings, number)
    assert returned == code, output_text
    found = checkpoints(tmp_path / "parts")
    assert found and "000000060" not in found[-1].name
    if number == signal.SIGTERM:
        assert f"stopped at step {int(found[-1].stem.split('-')[1])}, which is saved" in output_text
    TokenizerTrainer.open(settings).run()
    TokenizerTrainer.open(config(scene_folder, tmp_path / "whole", **options)).run()
    for name, tensor in load_file(tmp_path / "whole" / "model.safetensors").items():
        assert torch.equal(tensor, load_file(tmp_path / "parts" / "model.safetensors")[name]), name


def flip_a_bit(content):
    return content[:-40] + bytes([content[-40] ^ 1]) + content[-39:]


@pytest.mark.parametrize("damage", [lambda content: content[:5000], flip_a_bit], ids=["cut off", "a bit flipped"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(scene_folder, tmp_path, caplog, damage):
    settings = config(scene_folder, tmp_path, max_steps=6)
    TokenizerTrainer.open(settings).run()
    assert [path.name[-16:-12] for path in checkpoints(tmp_path)] == ["0004", "0006"]  # two are kept
    expected = load_file(tmp_path / "model.safetensors")
    newest = checkpoints(tmp_path)[-1]
    newest.write_bytes(damage(newest.read_bytes()))
    with caplog.at_level("INFO"):
        TokenizerTrainer.open(settings).run()
    assert "trying the one before" in caplog.text and "resuming from step 4" in caplog.text
    assert all(
        torch.equal(tensor, expected[name]) for name, tensor in load_file(tmp_path / "model.safetensors").items()
    )
    for path in checkpoints(tmp_path):
        path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="none of the 2 checkpoints .* --overwrite true"):
        TokenizerTrainer.open(settings).run()


def test_a_full_disk_ends_the_run_and_keeps_earlier_checkpoints(scene_folder, tmp_path):
    trainer = TokenizerTrainer.open(config(scene_folder, tmp_path))
    original = trainer.save_checkpoint

    def fill_the_disk_after_two_steps():
        if trainer.step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
        original()

    trainer.save_checkpoint = fill_the_disk_after_two_steps
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(
            ValueError, match="0004.safetensors cannot be written: .*0002.safetensors is kept; make room"
        ):
            trainer.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-000000002.safetensors"]
    TokenizerTrainer.open(config(scene_folder, tmp_path)).run()
    assert len(checkpoints(tmp_path)) == 2


def train_on_rank(rank, port, settings, queue):
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    queue.put((rank, str(TokenizerTrainer.open(settings).run())))
    dist.destroy_process_group()


def train_in_two_processes(settings):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=train_on_rank, args=(rank, port, settings, queue)) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    assert [child.exitcode for child in children] == [0, 0]


@pytest.mark.parametrize("quantizer", ["rvq", "simvq", "fsq"])
def test_two_processes_train_as_one_on_the_joint_batch_and_one_resumes_alone(
    scene_folder, teacher_folder, tmp_path, quantizer
):
    options = dict(
        model={"quantizer": quantizer},
        teacher=str(teacher_folder),
        semantic_weight=0.1,
        gan_weight=0.5,
        gan_start=1,
        gan_adaptive=True,
        weights_ema=0.9,
    )
    TokenizerTrainer.open(config(scene_folder, tmp_path / "one", max_steps=4, **options)).run()
    train_in_two_processes(config(scene_folder, tmp_path / "two", max_steps=4, **options))
    one, two = ([json.loads(line) for line in (tmp_path / n / "metrics.jsonl").open()] for n in ("one", "two"))
    assert len(one) == len(two) == 6
    for alone, shared in zip(one, two, strict=True):
        for name in alone.keys() - {"time", "images_per_second"}:
            # Rounding depends on the batch size, and training against a discriminator amplifies it.
            rel = 2e-3 if name in ("loss", "gan", "discriminator") else 2e-4
            assert shared[name] == pytest.approx(alone[name], rel=rel, abs=1e-5), (alone["step"], name)
    weights = [load_file(tmp_path / n / "checkpoint-000000004.safetensors") for n in ("one", "two")]
    assert {n for n in weights[1] if n.startswith("random.")} == {"random.0.cpu", "random.1.cpu"}
    for name in (name for name in weights[0] if name.startswith(("quantizer.", "model.quantizer."))):
        torch.testing.assert_close(weights[1][name], weights[0][name], rtol=1e-3, atol=1e-3)
    TokenizerTrainer.open(config(scene_folder, tmp_path / "two", max_steps=5, **options)).run()
    assert checkpoints(tmp_path / "two")[-1].name == "checkpoint-000000005.safetensors"


def test_averaged_weights_follow_their_definition_and_are_saved(scene_folder, tmp_path):
    model = torch.nn.Linear(2, 1)
    average, expected = WeightsEMA(model, 0.5), model.weight.detach().clone()
    for step in range(1, 20):
        with torch.no_grad():
            model.weight.add_(step)
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    live = model.weight.detach().clone()
    with average.applied():
        torch.testing.assert_close(model.weight.detach(), expected)
    assert torch.equal(model.weight, live)

    TokenizerTrainer.open(config(scene_folder, tmp_path, weights_ema=0.9)).run()
    saved, checkpoint = load_file(tmp_path / "model.safetensors"), load_file(checkpoints(tmp_path)[-1])
    name = "pixel_decoder.conv_out.weight"
    assert torch.equal(saved[name], checkpoint[f"weights_ema.{name}"])
    assert not torch.equal(saved[name], checkpoint[f"model.{name}"])
    assert torch.equal(saved["quantizer.codebooks"], checkpoint["model.quantizer.codebooks"])
    with pytest.raises(UserError, match="pass --overwrite true"):
        TokenizerTrainer.open(config(scene_folder, tmp_path / "plain")).run()
        TokenizerTrainer.open(config(scene_folder, tmp_path / "plain", weights_ema=0.9, max_steps=5)).run()


def test_an_exploding_loss_stops_and_a_single_peak_does_not():
    watch = LossWatch(max_growth=5.0)
    for step in range(150):
        watch.check({"pixel": 1.0 + step % 2, "small": 0.001, "gan": (-1) ** step * 100.0 ** (step % 3)})
    for _ in range(20):
        watch.check({"pixel": 1.5, "small": 1.0})  # a thousand times its previous value, but harmless
    for _ in range(9):
        watch.check({"pixel": 1000.0, "small": 0.001})
    resumed = LossWatch(max_growth=5.0)
    resumed.load_state_dict(watch.state_dict())
    with pytest.raises(UserError, match="the pixel loss is 1000, more than 5 times the previous total loss, 1.6"):
        resumed.check({"pixel": 1000.0, "small": 0.001})
    watch.check({"pixel": 1.0, "small": 0.001})
    watch.check({"pixel": 1000.0, "small": 0.001})


def test_a_level_that_collapses_is_named(scene_folder, tmp_path, caplog):
    usage = CodeUsage(2, 100)
    usage.update(torch.stack([torch.arange(100), torch.zeros(100, dtype=torch.long)], 1))
    assert collapsed_levels(usage, 0.05) == ["level 2: 1.0% of the codes in use, perplexity 1.0"]
    few = CodeUsage(1, 100)
    few.update(torch.arange(10)[:, None])
    assert collapsed_levels(few, 0.5) == []  # only ten codes could be used
    TokenizerTrainer.open(config(scene_folder, tmp_path, min_code_usage=1.0, max_steps=2)).run()
    assert "step 2: level 1:" in caplog.text and "of the codes in use" in caplog.text


def test_broken_images_are_named_in_every_process_and_too_many_stop_the_run(tmp_path, scene_folder):
    data = tmp_path / "data"
    shutil.copytree(scene_folder / "train" / "images", data)
    (data / "000003.png").write_bytes(b"no image")
    options = {"data": [str(data)], "val_fraction": 0.0, "kmeans_images": 0, "max_steps": 12}
    train_in_two_processes(config(scene_folder, tmp_path / "some", **options, max_bad_fraction=0.1))
    report = [json.loads(line) for line in (tmp_path / "some" / "bad_images.jsonl").open()]
    assert [row["sample"] for row in report] == [f"{data}/000003.png"] and "cannot be read" in report[0]["reason"]
    with pytest.raises(UserError, match="1 of 24 samples are unusable, over the limit of 1.00%"):
        TokenizerTrainer.open(config(scene_folder, tmp_path / "none", **options, max_bad_fraction=0.01)).run()


def test_validation_on_other_data_goes_to_tensorboard_with_pictures(scene_folder, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    TokenizerTrainer.open(
        config(scene_folder, tmp_path, val_data=[str(scene_folder / "val")], val_fraction=0.01, max_steps=2)
    ).run()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["images"] == ["validation"] and "val_psnr" in events.Tags()["scalars"]
    encoded = events.Images("validation")[0].encoded_image_string
    assert open_picture(encoded).tobytes() == open_picture(tmp_path / "validation_0000002.png").tobytes()
    assert open_picture(encoded).width == 6 * 52 - 4  # all six images of the other folder


def test_mixed_sources_train_and_resume(scene_folder, tmp_path):
    import tarfile

    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        for path in sorted((scene_folder / "val" / "images").iterdir()):
            archive.add(path, path.name)
    sources = [str(scene_folder / "train"), str(tmp_path / "shard.tar")]
    TokenizerTrainer.open(config(scene_folder, tmp_path / "out", data=sources, data_weights=[1, 3], max_steps=2)).run()
    TokenizerTrainer.open(config(scene_folder, tmp_path / "out", data=sources, data_weights=[1, 3], max_steps=4)).run()
    assert checkpoints(tmp_path / "out")[-1].name == "checkpoint-000000004.safetensors"


def test_bf16_and_gradient_checkpointing_train(scene_folder, tmp_path):
    plain = TokenizerTrainer.open(config(scene_folder, tmp_path / "plain"))
    options = {"bf16": True, "gradient_checkpointing": True}
    lean = TokenizerTrainer.open(config(scene_folder, tmp_path / "lean", **options))
    lean.model.load_state_dict(plain.model.state_dict())
    images = torch.rand(4, 3, 48, 48) * 2 - 1
    terms = [trainer.train_step(images) for trainer in (plain, lean)]
    for name, value in terms[0].items():
        torch.testing.assert_close(terms[1][name], value, rtol=0.05, atol=0.01)
    assert all(weight.dtype == torch.float32 for weight in lean.model.parameters())


def train(settings):
    TokenizerTrainer.open(settings).run()


@pytest.mark.slow
def test_compiled_networks_train_like_eager_ones(scene_folder, teacher_folder, tmp_path):
    options = {"teacher": str(teacher_folder), "semantic_weight": 0.1, "gan_weight": 0.5, "gan_start": 1}
    for name, compiled in (("eager", False), ("compiled", True)):
        settings = config(scene_folder, tmp_path / name, compile=compiled, **options)
        # In a child process: compiled training starts autograd threads, after which a process cannot fork ranks.
        process = multiprocessing.get_context("fork").Process(target=train, args=(settings,))
        process.start()
        process.join()
        assert process.exitcode == 0
    eager, compiled = (
        [json.loads(line) for line in (tmp_path / n / "metrics.jsonl").open()] for n in ("eager", "compiled")
    )
    for one, other in zip(eager, compiled, strict=True):
        for name in one.keys() - {"time", "images_per_second"}:
            # From the third step on, a code near a tie may differ.
            tolerance = 1e-3 if one["step"] < 3 and not name.startswith("val") else 3e-2
            assert other[name] == pytest.approx(one[name], rel=tolerance, abs=1e-3), (one["step"], name)


def test_a_checkpoint_of_another_shape_is_rejected(scene_folder, tmp_path):
    TokenizerTrainer.open(config(scene_folder, tmp_path, max_steps=1)).run()
    with pytest.raises(UserError, match="at step 1, trained with other settings: model: {} before"):
        TokenizerTrainer.open(config(scene_folder, tmp_path, model={"codebook_size": 64})).run()
    TokenizerTrainer.open(
        config(scene_folder, tmp_path, model={"codebook_size": 64}, overwrite=True, max_steps=1)
    ).run()


def test_a_checkpoint_with_other_weights_is_rejected_in_one_line(scene_folder, tmp_path):
    TokenizerTrainer.open(config(scene_folder, tmp_path, max_steps=1)).run()
    (path,) = checkpoints(tmp_path)
    tensors = load_file(path)
    del tensors["model.pixel_decoder.conv_out.bias"]
    save_file(tensors, path)
    owned_folder(tmp_path).note(sha256={})  # as in a run of an earlier version
    with pytest.raises(
        UserError, match=r"1 missing \(pixel_decoder.conv_out.bias\).*--overwrite true to start over"
    ) as e:
        TokenizerTrainer.open(config(scene_folder, tmp_path, max_steps=2)).run()
    assert path.name in str(e.value) and "\n" not in str(e.value)


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_another_setting_or_other_images_are_rejected_on_resumption(scene_folder, tmp_path):
    TokenizerTrainer.open(config(scene_folder, tmp_path, max_steps=2)).run()
    before = files(tmp_path)
    for options, message in [
        ({"batch_size": 2}, "batch_size: 4 before, 2 now"),
        ({"seed": 5, "pixel_loss": "l1"}, "pixel_loss: l2 before, l1 now; seed: 0 before, 5 now"),
        ({"weights_ema": 0.9}, "weights_ema: 0.0 before, 0.9 now"),
        ({"data": [str(scene_folder / "val")]}, "data: .* images, digest .* before, .* images, digest .* now"),
    ]:
        with pytest.raises(UserError, match=f"holds a run at step 2, trained with other settings: .*{message}"):
            TokenizerTrainer.open(config(scene_folder, tmp_path, **{"max_steps": 4, **options})).run()
        assert files(tmp_path) == before
    TokenizerTrainer.open(config(scene_folder, tmp_path, max_steps=4, learning_rate=1e-4, log_every=2)).run()
    recipe = (tmp_path / "recipe.yaml").read_text()
    assert recipe.startswith(
        "# step 2: max_steps: 2 before, 4 now\n# step 2: learning_rate: 0.001 before, 0.0001 now\n"
    )


def test_a_missing_recipe_is_logged_because_settings_are_not_compared(scene_folder, tmp_path, caplog):
    TokenizerTrainer.open(config(scene_folder, tmp_path, max_steps=1)).run()
    (tmp_path / "recipe.yaml").write_text("max_steps: [")
    with pytest.raises(UserError, match="recipe.yaml cannot be read as settings.*a run at step 1"):
        TokenizerTrainer.open(config(scene_folder, tmp_path, max_steps=1))
    (tmp_path / "recipe.yaml").unlink()
    TokenizerTrainer.open(config(scene_folder, tmp_path, max_steps=1))
    assert "recipe.yaml is missing, so the settings cannot be compared" in caplog.text


def test_a_changed_setting_without_effect_does_not_stop_a_resumed_run(scene_folder, tmp_path):
    options = {"val_data": [str(scene_folder / "val")], "val_fraction": 0.01, "max_steps": 1}
    TokenizerTrainer.open(config(scene_folder, tmp_path, **options)).run()
    saved = yaml.safe_load((tmp_path / "recipe.yaml").read_text()) | {"gan_start": 5, "val_fraction": 0.2}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(saved))
    TokenizerTrainer.open(config(scene_folder, tmp_path, **options)).run()


def test_images_of_the_same_names_are_distinguished_by_content_on_resumption(scene_folder, tmp_path, caplog):
    folders = [tmp_path / name for name in ("first", "moved", "others")]
    images = sorted((scene_folder / "val" / "images").iterdir())
    for folder, shift in zip(folders, (0, 0, 1), strict=True):
        folder.mkdir()
        for number in range(20):
            (folder / f"{number}.png").write_bytes(images[(number + shift) % len(images)].read_bytes())
    first, moved, others = ({"data": [str(folder)], "val_fraction": 0} for folder in folders)
    run = tmp_path / "run"
    TokenizerTrainer.open(config(scene_folder, run, max_steps=1, **first)).run()
    before = files(run)
    with pytest.raises(UserError, match="images: 20 compared before, 20 of them with other content"):
        TokenizerTrainer.open(config(scene_folder, run, max_steps=2, **others)).run()
    assert files(run) == before
    (folders[1] / "3.png").write_bytes(images[5 % len(images)].read_bytes())  # like a broken image that was replaced
    TokenizerTrainer.open(config(scene_folder, run, max_steps=2, **moved)).run()
    assert "1 of 20 compared images have changed" in caplog.text


def test_overwriting_replaces_only_the_run_and_only_after_a_step(scene_folder, tmp_path):
    run = tmp_path / "run"
    TokenizerTrainer.open(config(scene_folder, run, max_steps=2)).run()
    (run / "thesis.tex").write_text("mine")
    (run / "checkpoint-7.safetensors").write_text("of another program")
    before = files(run)
    with pytest.raises(UserError):
        TokenizerTrainer.open(config(scene_folder, run, data=[str(tmp_path / "absent")], overwrite=True))
    assert files(run) == before
    failing = TokenizerTrainer.open(config(scene_folder, run, max_steps=1, overwrite=True))

    def fail(pixels):
        assert (run / ".replaced").is_dir() and (run / "thesis.tex").is_file()
        raise RuntimeError

    failing.train_step = fail
    with pytest.raises(RuntimeError):
        failing.run()
    assert files(run) == before
    TokenizerTrainer.open(config(scene_folder, run, max_steps=1, overwrite=True, keep_checkpoints=1)).run()
    assert [path.name for path in checkpoints(run)] == ["checkpoint-000000001.safetensors"]
    assert {"thesis.tex", "checkpoint-7.safetensors"} <= files(run).keys() and not (run / ".replaced").exists()
    assert "checkpoint-000000002.safetensors" not in files(run)


def test_a_model_of_another_program_stops_the_run_first(scene_folder, tmp_path):
    (tmp_path / "config.json").write_text("of another model")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="config.json was not written by this program"):
            TokenizerTrainer.open(config(scene_folder, tmp_path, overwrite=overwrite))
    assert (tmp_path / "config.json").read_text() == "of another model"


def test_the_treatment_of_every_setting_on_resumption_is_defined():
    tables = (output.IRRELEVANT, output.APPLIED, output.BY_CONTENT, output.REJECTED)
    names = [name for table in tables for name in table]
    assert len(names) == len(set(names)) and set(names) == {field.name for field in fields(TokenizerTrainingConfig)}


def test_the_encoder_starts_as_the_teacher(scene_folder, teacher_folder, tmp_path):
    trainer = TokenizerTrainer.open(config(scene_folder, tmp_path, semantic_weight=1.0, teacher=str(teacher_folder)))
    images = torch.rand(2, 3, 48, 48) * 2 - 1
    teacher = load_teacher(str(teacher_folder))
    with torch.no_grad():
        features = trainer.model.encoder.features(images)
    torch.testing.assert_close(features, teacher_features(teacher, images), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"semantic_weight": 1.0}, "teacher is not set"),
        ({"semantic_weight": 1.0, "teacher": "nowhere"}, "teacher 'nowhere' cannot be loaded"),
        ({"teacher": "siglip"}, "teacher siglip has no effect with semantic_weight 0"),
        ({"teacher_layer": "-1"}, "teacher_layer -1 has no effect without --teacher"),
        ({"teacher_standardize": True}, "teacher_standardize True has no effect without --teacher"),
        ({"semantic_weight": 1.0, "teacher": "t", "teacher_layer": "last"}, "expected a layer such as -2"),
        ({"semantic_weight": 1.0, "teacher": "t", "teacher_size": 0}, "teacher_size must be at least 1 pixel"),
        ({"gan_start": 1}, "gan_start 1 has no effect with gan_weight 0"),
        ({"gan_adaptive": True}, "gan_adaptive True has no effect with gan_weight 0"),
        ({"val_data": ["images"]}, "val_fraction 0.1 has no effect with val_data"),
        ({"pixel_loss": "huber"}, "pixel_loss must be l1 or l2"),
        ({"val_fraction": 1.0}, "val_fraction"),
        ({"weights_ema": 1.0}, "weights_ema must be at least 0 and below 1"),
        ({"report_to": "paper"}, "report_to must be tensorboard, wandb, both or none"),
        ({"max_loss_growth": 1.0}, "max_loss_growth must be above 1"),
        ({"learning_rate": -1.0}, "learning_rate must be at least 0, got -1.0"),
        ({"pixel_weight": -1.0}, "pixel_weight must be at least 0"),
        ({"val_images": -1}, "val_images must be at least 0"),
        ({"num_workers": -1}, "num_workers must be at least 0"),
        ({"batch_size": 10**30}, "batch_size must be below"),
        ({"seed": -1}, "seed must be from 0"),
        ({"data": []}, "data names no images"),
        ({"data_weights": [1.0, 2.0]}, "expected 1 weights above 0, one per source"),
        ({"preset": "huge"}, "unknown preset"),
        ({"data": []}, "data names no images"),
        ({"learning_rate": -1e-4}, "learning_rate must be at least 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be at least 0, got nan"),
        ({"seed": -1}, "seed must be from 0 to"),
        ({"num_workers": -1}, "num_workers must be at least 0"),
        ({"val_images": -1}, "val_images must be at least 0"),
        ({"model": {"decoder_norm_groups": 7}}, "16 channels .* cannot be split into 7 groups"),
        ({"model": {"decoder_norm_groups": 0}}, "decoder_norm_groups must be from 1 to"),
        ({"model": {"encoder_num_heads": 0}}, "encoder_num_heads must be from 1 to"),
        ({"model": {"decoder_channel_multipliers": [1, 1, 2, 4, "8"]}}, "expected a list of whole numbers above 0"),
    ],
)
def test_settings_that_cannot_work_are_rejected(scene_folder, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        TokenizerTrainer.open(config(scene_folder, tmp_path, **options))


def test_flags_drop_settings_of_a_recipe_that_have_no_effect_with_them():
    assert "val_fraction" not in training_values("photos", {"val_data": ["images"]})
    assert training_values("photos", {"init_from": "x", "model": "{pixel_depth: 2}"})["model"] == {"pixel_depth": 2}
    assert training_values("photos", {"model": "{pixel_depth: 2}"})["model"]["image_size"] == 64
    assert "teacher" not in training_values("paper", {"semantic_weight": "0"})
    both = training_values("photos", {"val_data": ["images"], "val_fraction": "0.2"})
    with pytest.raises(UserError, match="val_fraction 0.2 has no effect with val_data"):
        TokenizerTrainingConfig(**both, data=["images"], output_dir="out")


@pytest.mark.parametrize("name", ["validation_0000002.png", "checkpoint-000000003.safetensors"])
def test_a_file_of_the_user_that_a_later_step_would_overwrite_is_rejected_first(scene_folder, tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"{name} was not written by this program"):
        TokenizerTrainer.open(config(scene_folder, tmp_path, max_steps=4))
    TokenizerTrainer.open(config(scene_folder, tmp_path, max_steps=1)).run()
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize("place", ["tensorboard", "out"])
def test_an_output_that_cannot_be_written_is_an_error_of_one_line(scene_folder, tmp_path, monkeypatch, capsys, place):
    (tmp_path / "out").mkdir()
    settings = config(scene_folder, tmp_path / "out", max_steps=1)
    if place == "tensorboard":
        (tmp_path / "out" / place).write_text("a file where a folder belongs")
    else:
        trained = EvoTokModel.save_pretrained
        monkeypatch.setattr(EvoTokModel, "save_pretrained", lambda self, folder: trained(self, no_permission(folder)))
    assert main(["train", *settings_as_flags(settings)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"error: {tmp_path / 'out'}") and "cannot be written" in error


def no_permission(folder):
    raise PermissionError(errno.EACCES, "Permission denied", str(folder / "model.safetensors"))


def test_a_teacher_learns_from_the_names_of_photographs(tmp_path, tiny_tokenizer_folder, rng):
    for name in ("n01484850_great_white_shark", "n01440764_tench"):
        Image.fromarray(rng.integers(0, 256, (80, 70, 3), dtype=np.uint8)).save(tmp_path / f"{name}.jpg")
    assert [caption for _, caption in captioned_images(tmp_path)] == ["tench", "great white shark"]
    vision = EvoTokConfig.preset("tiny", image_size=64, patch_size=8, decoder_channel_multipliers=[1, 2, 4, 8])
    out = tmp_path / "teacher"
    train_teacher(tmp_path, tiny_tokenizer_folder, out, max_steps=2, batch_size=2, vision=vision, augment=True)
    assert teacher_features(load_teacher(str(out)), torch.zeros(1, 3, 64, 64)).shape == (1, 64, 128)


def test_a_teacher_of_another_size_is_rejected(scene_folder, teacher_folder, tmp_path):
    with pytest.raises(
        UserError, match="trained with 9 positions, the tokenizer has 16; set image_size to 3 x patch_size"
    ):
        TokenizerTrainer.open(
            config(scene_folder, tmp_path, semantic_weight=1.0, teacher=str(teacher_folder), model={"image_size": 64})
        )


def test_damaged_weights_are_not_loaded_silently(tmp_path, tiny_evotok_folder):
    from evotok_plugin.tokenizer_folder import open_tokenizer

    for damage in ("drop", "shape"):
        folder = tmp_path / damage
        shutil.copytree(tiny_evotok_folder, folder)
        weights = load_file(folder / "model.safetensors")
        if damage == "drop":
            weights.pop("quantizer.codebooks")
        else:
            weights["quantizer.codebooks"] = torch.zeros(8, 4, 16)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match="quantizer.codebooks|cannot be loaded"):
            open_tokenizer(str(folder))


def test_preset_and_teacher_shapes_agree():
    tiny = EvoTokConfig.preset("tiny")
    assert tiny.semantic_dim == tiny.encoder_hidden_size


def test_shallow_and_deep_layers_are_targets_of_their_depths(scene_folder, teacher_folder, tmp_path):
    options = {"teacher": str(teacher_folder), "teacher_layer": "2:1, 8:-2", "teacher_standardize": True}
    options |= {"semantic_weight": 0.1}
    TokenizerTrainer.open(config(scene_folder, tmp_path / "whole", **options)).run()
    first = TokenizerTrainer.open(config(scene_folder, tmp_path / "parts", **options, save_every=1))
    heads = {name: value.clone() for name, value in first.objective.heads.state_dict().items()}
    original = first.save_checkpoint

    def stop():
        original()
        raise KeyboardInterrupt

    first.save_checkpoint = stop
    with pytest.raises(KeyboardInterrupt):
        first.run()
    changed = [
        name for name, value in first.objective.heads.state_dict().items() if not torch.equal(value, heads[name])
    ]
    assert len(changed) == len(heads) == 4
    resumed = TokenizerTrainer.open(config(scene_folder, tmp_path / "parts", **options, save_every=1))
    resumed.run()
    for name, tensor in load_file(tmp_path / "whole" / "model.safetensors").items():
        assert torch.equal(tensor, load_file(tmp_path / "parts" / "model.safetensors")[name]), name
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["semantic_at_2"] > 0 for line in lines if "semantic" in line)
    assert -1 <= lines[-1]["val_semantic_cosine_constant"] <= 1
    again = load_recorded_teacher(str(teacher_folder), tmp_path / "whole")
    again.fit_to(EvoTokConfig.preset("tiny"))
    images = torch.rand(2, 3, 48, 48) * 2 - 1
    assert torch.equal(again(images), resumed.objective.teacher(images))


def test_a_tokenizer_records_whether_its_semantic_decoder_was_trained(scene_folder, teacher_folder, tmp_path):
    def trained() -> bool:
        return json.loads((tmp_path / "config.json").read_text())["semantic_decoder_trained"]

    TokenizerTrainer.open(config(scene_folder, tmp_path, max_steps=2)).run()
    assert trained() is False
    with_teacher = {"teacher": str(teacher_folder), "semantic_weight": 1.0}
    with pytest.raises(UserError, match="semantic_weight: 0 before, 1.0 now"):  # Adam has no state for it
        TokenizerTrainer.open(config(scene_folder, tmp_path, max_steps=4, **with_teacher)).run()
    TokenizerTrainer.open(config(scene_folder, tmp_path, max_steps=1, overwrite=True, **with_teacher)).run()
    assert trained() is True
