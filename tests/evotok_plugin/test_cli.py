"""The commands of `evotok` on a tiny tokenizer, and the errors that they report in one line."""

import csv
import json

import pytest
from PIL import Image

from evotok_plugin.cli import main
from evotok_plugin.data.code_cache import CodeCache


@pytest.fixture
def images(scene_folder):
    return sorted((scene_folder / "val" / "images").iterdir())


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_encode_writes_codes_by_file_name(capsys, images, tiny_evotok_folder, tmp_path):
    out = tmp_path / "codes"
    code, text, _ = run(capsys, "encode", images[0].parent, "-o", out, "--model", tiny_evotok_folder)
    assert code == 0 and "6 images, 9 x 8 codes each" in text
    cache = CodeCache(out)
    assert list(cache.keys()) == [path.name for path in images] and cache.codes(images[2].name).shape == (9, 8)
    code, text, _ = run(capsys, "encode", "-o", out, "--verify")
    assert code == 0 and "all checksums match" in text


def test_reconstruct_shows_originals_above_reconstructions(capsys, images, tiny_evotok_folder, tmp_path):
    out = tmp_path / "r.png"
    code, text, _ = run(capsys, "reconstruct", *images[:3], "-o", out, "--model", tiny_evotok_folder)
    assert code == 0 and text.count("PSNR") == 3
    assert Image.open(out).size == (3 * 100 - 4, 2 * 100 - 4)


def test_images_are_encoded_and_reconstructed_at_another_size(capsys, images, tiny_evotok_folder, tmp_path):
    for name, flags in (("large", ["--size", 96]), ("own", [])):
        assert run(capsys, "encode", *images, "-o", tmp_path / name, "--model", tiny_evotok_folder, *flags)[0] == 0
    large, own = CodeCache(tmp_path / "large"), CodeCache(tmp_path / "own")
    assert large.facts.image_size == 96 and large.facts.num_positions == 4 * own.facts.num_positions
    code, _, error = run(capsys, "encode", *images, "-o", tmp_path / "own", "--model", tiny_evotok_folder, "--size", 96)
    assert code == 2 and "from images of 48 pixels, expected codes" in error
    picture = tmp_path / "r.png"
    assert run(capsys, "reconstruct", images[0], "-o", picture, "--model", tiny_evotok_folder, "--size", 96)[0] == 0
    assert Image.open(picture).size == (96, 2 * 96 + 4)


def test_evolve_writes_a_strip_and_a_curve(capsys, images, tiny_evotok_folder, tmp_path):
    assert run(capsys, "evolve", images[0], "-o", tmp_path, "--model", tiny_evotok_folder)[0] == 0
    rows = list(csv.DictReader((tmp_path / "evolution.csv").open()))
    assert [int(row["depth"]) for row in rows] == list(range(1, 9))
    assert Image.open(tmp_path / "evolution.png").width == 9 * 100 - 4


def test_evaluate_prints_the_same_results_as_it_writes(capsys, images, tiny_evotok_folder, tmp_path):
    out = tmp_path / "e.json"
    code, text, _ = run(capsys, "evaluate", images[0].parent, "-o", out, "--model", tiny_evotok_folder)
    results = json.loads(out.read_text())
    assert code == 0 and f"{results['psnr']:.2f} dB" in text
    assert results["images"] == 6 and len(results["code_usage"]) == 8 and -1 <= results["ssim"] <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reconstruct", "absent.png"], "'absent.png' does not exist"),
        (["reconstruct", "{broken}"], "cannot be read"),
        (["evaluate", "{broken}"], "1 of 1 samples are unusable"),
        (["evolve", "{image}", "--model", "{folder}"], "is not a model folder"),
        (["evolve", "{image}", "--model", "{backbone}"], "holds a qwen2 model, expected evotok"),
        (["reconstruct", "{image}", "--depth", "12"], "depth must be in 1..8"),
        (["reconstruct", "{image}", "--size", "50"], "--size must be a multiple of the patch size"),
        (["encode", "{image}", "--size", "0"], "--size must be a multiple of the patch size"),
        (["train", "--recipe", "nothing"], "unknown recipe 'nothing'"),
        (["train", "--recipe", "{typo}"], "unknown key 'batch_sise'; did you mean 'batch_size'"),
        (
            ["train", "--recipe", "photos", "--data", "absent", "--output_dir", "{folder}"],
            "'absent' does not exist",
        ),
        (["train", "--recipe", "photos", "--data", "x"], "output_dir"),
    ],
)
def test_user_errors_are_one_line(
    capsys, images, tiny_evotok_folder, tiny_backbone_folder, tmp_path, arguments, message
):
    (tmp_path / "broken.png").write_bytes(b"not an image")
    (tmp_path / "typo.yaml").write_text("batch_sise: 3\n")
    places = {
        "broken": tmp_path / "broken.png", "image": images[0], "folder": tmp_path, "typo": tmp_path / "typo.yaml",
        "backbone": tiny_backbone_folder,
    }  # fmt: skip
    arguments = [argument.format(**places) for argument in arguments]
    if arguments[0] != "train" and "--model" not in arguments:
        arguments += ["--model", str(tiny_evotok_folder)]
    code, _, error = run(capsys, *arguments)
    assert code == 2 and error.strip().splitlines()[-1].startswith("error: ") and message in error
