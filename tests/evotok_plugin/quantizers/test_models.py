"""Tokenizers with each kind of quantizer: training, reloading, towers, commands, and fewer levels."""

import csv
import json

import pytest
import torch
from safetensors.torch import load_file

from evotok_plugin import EvoTokImageProcessor, EvoTokModel, EvoTokVisionModel
from evotok_plugin.cli import main
from evotok_plugin.data.code_cache import CodeCache
from evotok_plugin.plugins.tower_network import TowerNetwork, read_settings
from evotok_plugin.training.config import TokenizerTrainingConfig
from evotok_plugin.training.trainer import TokenizerTrainer

MODELS = {
    "rvq": {"quantizer_gradient": "rotation"},
    "simvq": {"quantizer": "simvq", "quantizer_gradient": "rotation"},
    "fsq": {"quantizer": "fsq"},
}


def config(scene_folder, output, **options):
    values = dict(
        data=[str(scene_folder / "train")], output_dir=str(output), preset="tiny", max_steps=30, batch_size=8,
        learning_rate=2e-3, lpips_weight=0, gan_weight=0, semantic_weight=0, pixel_weight=20, kmeans_images=16,
        augment=False, val_fraction=0.1, val_every=30, save_every=30, log_every=1, report_to="none",
    )  # fmt: skip
    return TokenizerTrainingConfig(**values | options)


@pytest.fixture(scope="module", params=MODELS)
def trained(request, scene_folder, tmp_path_factory):
    """Name and folder of a tokenizer trained for a few steps; its semantic decoder is random, but counts as trained."""
    folder = tmp_path_factory.mktemp(request.param)
    TokenizerTrainer.open(config(scene_folder, folder, model=MODELS[request.param])).run()
    values = json.loads((folder / "config.json").read_text()) | {"semantic_decoder_trained": True}
    (folder / "config.json").write_text(json.dumps(values))
    return request.param, folder


def test_training_lowers_the_loss(trained):
    _, folder = trained
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    pixel = [line["pixel"] for line in lines if "pixel" in line]
    assert sum(pixel[-5:]) < 0.7 * sum(pixel[:5])


def test_every_tensor_of_the_quantizer_is_stored_and_what_is_learned_has_moved(trained, scene_folder, tmp_path):
    kind, folder = trained
    own = {name.removeprefix("quantizer.") for name in load_file(folder / "model.safetensors") if "quantizer" in name}
    assert own == {"rvq": {"codebooks"}, "simvq": {"bases", "maps"}, "fsq": {"maps_in", "maps_out"}}[kind]
    settings = config(scene_folder, tmp_path, model=MODELS[kind], max_steps=1)
    TokenizerTrainer.open(settings).run()
    before, after = (load_file(place / "model.safetensors") for place in (tmp_path, folder))
    moved = {name for name in own if not torch.equal(before[f"quantizer.{name}"], after[f"quantizer.{name}"])}
    assert moved == own - {"bases"}


def test_codes_are_those_of_the_reloaded_model_in_any_precision(trained, pixel_values):
    _, folder = trained
    model = EvoTokModel.from_pretrained(folder).eval()
    half = EvoTokModel.from_pretrained(folder, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        encoded = model.encode(pixel_values)
        assert torch.equal(model(pixel_values).codes, encoded.codes)
        assert torch.equal(half.quantizer(encoded.latents).codes, encoded.codes)
        assert torch.equal(model.half().quantizer(encoded.latents).codes, encoded.codes)
    assert torch.equal(half.quantizer.codebooks, model.quantizer.codebooks)


def test_towers_give_the_features_of_the_tokenizer(trained, pixel_values):
    _, folder = trained
    with torch.no_grad():
        expected = EvoTokModel.from_pretrained(folder).eval()(pixel_values).features
    tower, network = EvoTokVisionModel.from_pretrained(folder), TowerNetwork(folder, read_settings(folder))
    torch.testing.assert_close(tower(pixel_values).last_hidden_state, expected)
    torch.testing.assert_close(network(pixel_values), expected)
    for part in (tower.quantizer, network.quantizer):
        assert part.is_fixed and not list(part.parameters())
    assert not any("quantizer" in name for name in network.state_dict())
    codebooks = tower.quantizer.codebooks.clone()
    tower.train()(pixel_values).last_hidden_state.square().sum().backward()
    assert any(parameter.grad is not None for parameter in tower.encoder.parameters())
    assert torch.equal(tower.quantizer.codebooks, codebooks)


def test_the_commands_take_the_tokenizer(trained, scene_folder, tmp_path, capsys):
    _, folder = trained
    images = str(scene_folder / "val")
    assert main(["encode", images, "-o", str(tmp_path / "codes"), "--model", str(folder)]) == 0
    assert main(["evolve", images, "-o", str(tmp_path / "evolution"), "--model", str(folder), "--fit"]) == 0
    arguments = ["evaluate", images, "--model", str(folder), "--metrics", "psnr", "usage"]
    assert main([*arguments, "-o", str(tmp_path / "metrics.json")]) == 0
    assert main(["reconstruct", images, "--model", str(folder), "-o", str(tmp_path / "rebuilt.png")]) == 0
    capsys.readouterr()
    rows = list(csv.DictReader((tmp_path / "evolution" / "evolution.csv").open()))
    assert len(rows) == 8 and all(float(row["psnr"]) > 10 and float(row["pixel_r2"]) < 1 for row in rows)
    assert json.loads((tmp_path / "metrics.json").read_text())["psnr"] > 10
    model = EvoTokModel.from_pretrained(folder).eval()
    cache = CodeCache(tmp_path / "codes", fingerprint=model.fingerprint())
    path = next((scene_folder / "val").rglob("*.png"))
    pixels = EvoTokImageProcessor.from_pretrained(folder)(path, return_tensors="pt").pixel_values
    with torch.no_grad():
        codes = model.encode(pixels).codes[0]
    assert torch.equal(torch.as_tensor(cache.codes(path.relative_to(scene_folder / "val").as_posix())).long(), codes)


def test_decoders_train_on_the_first_levels_of_another_tokenizer(trained, scene_folder, tmp_path):
    _, folder = trained
    depths = {"pixel_depth": 2, "num_quantizers": 3, "semantic_depth": 3}
    settings = config(
        scene_folder, tmp_path, init_from=str(folder), max_steps=2, train_parts="decoders", model=depths, save_every=1
    )
    TokenizerTrainer.open(settings).run()
    before, after = (load_file(place / "model.safetensors") for place in (folder, tmp_path))
    for name in (name for name in before if name.startswith("quantizer.")):
        assert torch.equal(after[name], before[name][:3])
    name = "pixel_decoder.from_latent.weight"
    assert not torch.equal(before[name], after[name])
    assert EvoTokModel.from_pretrained(tmp_path).quantizer.codebooks.shape[0] == 3


@pytest.mark.parametrize("field", ["quantizer", "fsq_levels"])
def test_another_quantizer_than_that_of_the_weights_is_rejected(trained, scene_folder, tmp_path, field, capsys):
    kind, folder = trained
    value = {"quantizer": "simvq" if kind != "simvq" else "rvq", "fsq_levels": "[4, 8]"}[field]
    arguments = ["--init_from", str(folder), "--model", f"{{{field}: {value}}}", "--semantic_weight", "0"]
    data = ["--data", str(scene_folder / "train"), "--output_dir", str(tmp_path)]
    assert main(["train", "--recipe", "tiny", *data, *arguments]) == 2
    assert f"model: {field} " in capsys.readouterr().err
