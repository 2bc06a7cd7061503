"""`evotok_reconstruction`: the model's tokenizer measured in lmms-eval as by `evotok evaluate`."""

import json

import pytest
from PIL import Image

from eval_tasks.tasks.evotok_reconstruction import task as reconstruction
from eval_tasks.tasks.evotok_reconstruction.task import IMAGES_VARIABLE, LIMIT_VARIABLE
from evotok_plugin import EvoTokImageProcessor, EvoTokModel
from evotok_plugin.data.sources import open_sources
from evotok_plugin.errors import UserError
from evotok_plugin.evaluation.evaluate import evaluate as evaluate_tokenizer


@pytest.fixture
def images(scene_folder, monkeypatch):
    folder = scene_folder / "val/images"
    monkeypatch.setenv(IMAGES_VARIABLE, str(folder))
    monkeypatch.delenv(LIMIT_VARIABLE, raising=False)
    return folder


@pytest.fixture
def lm(tiny_mllm, lmms_eval_tasks, tmp_path):
    from eval_tasks.model import EvoTokLmms
    from llava_ext.model_folder import OpenModel

    load = lambda *_: OpenModel(*tiny_mllm, "tiny", "tiny")  # noqa: E731
    return EvoTokLmms("somewhere", load=load, device="cpu", images_dir=str(tmp_path / "images"))


@pytest.fixture
def no_weights(monkeypatch):
    """Simulates a machine without the weights of the measuring networks."""

    def absent():
        raise UserError("weights are not there")

    monkeypatch.setattr(reconstruction, "load_inception", absent)
    monkeypatch.setattr(reconstruction, "load_lpips", absent)


def test_figures_equal_those_of_evotok_evaluate(images, lm, evaluate, no_weights, tiny_evotok_folder, tmp_path, caplog):
    results = evaluate(lm, ["evotok_reconstruction"])["results"]["evotok_reconstruction"]
    tokenizer = EvoTokModel.from_pretrained(tiny_evotok_folder).eval()
    expected = evaluate_tokenizer(
        tokenizer, EvoTokImageProcessor.from_pretrained(tiny_evotok_folder), open_sources([images])
    )
    for metric in ("psnr", "ssim"):
        assert results[f"{metric},none"] == pytest.approx(expected.values[metric], rel=1e-5)
    usage = expected.values["code_usage"]
    assert results["code_usage,none"] == pytest.approx(sum(usage) / len(usage))
    assert (results["num_images,none"], results["image_size,none"]) == (6, 48)
    assert "rfid,none" not in results and "lpips,none" not in results
    assert "leaves rfid out: weights are not there" in caplog.text
    kept = tmp_path / "images/evotok_reconstruction"
    assert json.loads((kept / "metrics.json").read_text())["images"] == 6
    assert (kept / "grid.png").is_file()


def test_a_limit_counts_images(images, lm, evaluate, no_weights, monkeypatch):
    monkeypatch.setenv(LIMIT_VARIABLE, "4")
    results = evaluate(lm, ["evotok_reconstruction"])["results"]["evotok_reconstruction"]
    assert results["num_images,none"] == 4


def test_a_truncated_image_is_named_and_nothing_is_measured(images, lm, evaluate, no_weights, tmp_path, monkeypatch):
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.effect_noise((64, 64), 50).convert("RGB").save(folder / "a.png")
    (folder / "b.png").write_bytes((folder / "a.png").read_bytes()[:300])
    monkeypatch.setenv(IMAGES_VARIABLE, str(folder))
    with pytest.raises(ValueError, match=r"1 of 2 samples are unusable.*b\.png"):
        evaluate(lm, ["evotok_reconstruction"])
    assert "b.png" in (tmp_path / "images/evotok_reconstruction/bad_samples.jsonl").read_text()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "set EVOTOK_RECONSTRUCTION_IMAGES=FOLDER"),
        ({IMAGES_VARIABLE: "nowhere"}, "nowhere"),
        ({IMAGES_VARIABLE: ".", LIMIT_VARIABLE: "few"}, "must be a number of at least 1, got 'few'"),
    ],
)
def test_invalid_settings_are_rejected(variables, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (48, 48)).save("a.png")
    monkeypatch.delenv(IMAGES_VARIABLE, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        reconstruction.images_source()


def test_answers_of_other_models_are_rejected():
    with pytest.raises(ValueError, match="needs `--model evotok`"):
        reconstruction.process_results({"process": 0}, ["I see a cat."])
