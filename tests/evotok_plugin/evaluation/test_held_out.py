"""`evotok evaluate --held_out`: the images that a training run did not see."""

import json

import pytest
from evaluation_inputs import Pictures
from PIL import Image

from evotok_plugin.cli import main
from evotok_plugin.data.sources import is_held_out
from evotok_plugin.errors import UserError
from evotok_plugin.evaluation.held_out import held_out_images


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The output folder of a real run of one step, started in `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for index, array in enumerate(Pictures(40).arrays):
        Image.fromarray(array).save(tmp_path / "images" / f"{index:02d}.png")
    words = (
        "train --preset tiny --data images --output_dir run --max_steps 1 --batch_size 4 --kmeans_images 0 "
        "--num_workers 0 --semantic_weight 0 --lpips_weight 0 --gan_weight 0 --val_fraction 0.2 --val_images 2 "
        "--report_to none"
    )
    assert main(words.split()) == 0
    return tmp_path / "run"


def test_the_images_are_those_that_the_run_held_out(run, capsys, tmp_path):
    held = held_out_images(run)
    names = {held.key(index) for index in range(len(held))}
    assert names == {f"{n:02d}.png" for n in range(40) if is_held_out(f"{n:02d}.png", 0.2)} and 1 < len(names) < 20
    assert main(["evaluate", "--held_out", "run", "-o", "out", "--num_workers", "0"]) == 0
    values = json.loads((tmp_path / "out/metrics.json").read_text())
    assert values["images"] == len(names) and values["model"] == "run"
    assert values["not_measured"]["cosine"].startswith("the semantic decoder was not trained")
    assert main(["evaluate", "images", "--model", "run", "-o", "all", "--num_workers", "0"]) == 0
    assert json.loads((tmp_path / "all/metrics.json").read_text())["images"] == 40
    capsys.readouterr()
    assert main(["evaluate", "images", "--held_out", "run"]) == 2
    assert "got both" in capsys.readouterr().err


def test_wrong_runs_are_user_errors(run, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="expected the output folder of `evotok train`"):
        held_out_images(tmp_path / "images")
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace("val_fraction: 0.2", "val_fraction: 0.0"))
    with pytest.raises(UserError, match="held out no images"):
        held_out_images(run)
    (tmp_path / "more").mkdir()
    Image.new("RGB", (48, 48)).save(tmp_path / "more/a.png")
    (run / "recipe.yaml").write_text(recipe.replace("val_data: null", "val_data: [more]"))
    assert [held_out_images(run).key(0)] == ["a.png"]
    (run / "recipe.yaml").write_text(recipe)
    monkeypatch.chdir(tmp_path / "more")
    with pytest.raises(UserError, match="run the command in the folder in which the run was started"):
        held_out_images(run)
