"""The command `evotok evaluate`: its files, its grid and its errors."""

import json

import numpy as np
import pytest
from evaluation_inputs import Pictures, options, reconstruct
from PIL import Image

from evotok_plugin.cli import main
from evotok_plugin.evaluation.evaluate import evaluate


@pytest.fixture
def folder(tmp_path):
    """Two folders of images, which are two classes."""
    for index, array in enumerate(Pictures(12).arrays):
        path = tmp_path / "images" / "ab"[index % 2] / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)
    return tmp_path / "images"


def run(capsys, *arguments):
    code = main(["evaluate", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_folder_gets_metrics_table_and_grid(capsys, folder, tiny_evotok_folder, teacher_folder, tmp_path):
    out = tmp_path / "new" / "out"
    code, text, _ = run(
        capsys, folder, "--model", tiny_evotok_folder, "-o", out, "--teacher", teacher_folder, "--num_workers", 0
    )
    values = json.loads((out / "metrics.json").read_text())
    assert code == 0 and {path.name for path in out.iterdir()} == {"metrics.json", "metrics.md", "grid.png"}
    assert (out / "metrics.md").read_text() in text and f"{values['psnr']:.2f} dB" in text
    assert f"{values['knn_accuracy']:.1%}" in text and f"{values['semantic_cosine'][7]:.4f}" in text
    assert values["model"] == str(tiny_evotok_folder) and values["images"] == 12 and values["probe_classes"] == 2
    assert Image.open(out / "grid.png").size == (12 * 100 - 4, 2 * 100 - 4)


def test_a_json_path_gets_only_the_metrics(capsys, folder, tiny_evotok_folder, tmp_path):
    out = tmp_path / "some" / "e.json"
    assert run(capsys, folder, "--model", tiny_evotok_folder, "-o", out, "--metrics", "psnr", "--size", 96)[0] == 0
    values = json.loads(out.read_text())
    assert values["image_size"] == 96 and "psnr" in values and "ssim" not in values
    assert [path.name for path in out.parent.iterdir()] == ["e.json"]


def test_the_grid_has_each_original_above_its_reconstruction(model, processor):
    source = Pictures(14)
    grid = np.array(evaluate(model, processor, source, options(num_pictures=14)).grid())
    pixel_values, pixels, _ = reconstruct(model, processor, source)
    for index in (0, 11, 12):
        row, column = 2 * (index // 12), index % 12
        for below, images in enumerate((pixel_values, pixels)):
            cell = grid[(row + below) * 100 :, column * 100 :][:96:2, :96:2]
            np.testing.assert_allclose(cell, processor.to_pil(images[index : index + 1])[0], atol=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--metrics", "rfid", "--inception_weights", "{folder}/a/00.png"], "expected 6726825d"),
        (["--metrics", "fid"], "unknown metric 'fid'"),
        (["--batch_size", "0"], "batch_size must be at least 1, got 0"),
        (["-o", "{folder}/a/00.png"], "expected a folder or NAME.json"),
        (["--size", "50"], "--size must be a multiple of the patch size"),
    ],
)
def test_user_errors_are_one_line(capsys, folder, tiny_evotok_folder, arguments, message):
    arguments = [argument.format(folder=folder) for argument in arguments]
    code, _, error = run(capsys, folder, "--model", tiny_evotok_folder, *arguments)
    assert code == 2 and error.strip().splitlines()[-1].startswith("error: ") and message in error
