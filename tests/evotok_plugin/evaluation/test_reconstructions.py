"""`evotok evaluate --reconstructions`: figures of other programs' images, equal to those of EvoTok's own."""

import json

import numpy as np
import pytest
import torch
from evaluation_inputs import Pictures, options
from PIL import Image

from evotok_plugin.cli import main
from evotok_plugin.data.sources import open_source
from evotok_plugin.errors import UserError
from evotok_plugin.evaluation.evaluate import evaluate
from evotok_plugin.evaluation.reconstructions import evaluate_reconstructions, pairing


@pytest.fixture
def folders(tmp_path, model, processor):
    """Originals in class folders, and the tokenizer's own reconstructions under the same names."""
    originals, rebuilt = tmp_path / "originals", tmp_path / "rebuilt"
    for index, array in enumerate(Pictures(10).arrays):
        path = originals / "ab"[index % 2] / f"{index:02d}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)
    for path in sorted(originals.rglob("*.bmp")):
        pixel_values = processor(Image.open(path)).pixel_values
        with torch.no_grad():
            pixels = model.decode_pixels(model.encode(pixel_values).codes[..., : model.config.pixel_depth])
        target = rebuilt / path.relative_to(originals).with_suffix(".png")
        target.parent.mkdir(parents=True, exist_ok=True)
        processor.to_pil(pixels)[0].save(target)
    return originals, rebuilt


def test_the_figures_are_those_of_the_tokenizer_that_wrote_the_images(folders, model, processor, network, tmp_path):
    originals, rebuilt = map(open_source, folders)
    given = options(metrics=["psnr", "ssim", "rfid"], stats_cache=tmp_path / "cache")
    own = evaluate(model, processor, originals, given)
    others = evaluate_reconstructions(originals, rebuilt, given)
    assert others.values["images"] == 10 and others.values["image_size"] == processor.size
    # The files hold 8-bit values, and were decoded one by one, which moves a few values by one.
    assert others.values["psnr"] == pytest.approx(own.values["psnr"], abs=0.01)
    assert others.values["ssim"] == pytest.approx(own.values["ssim"], abs=0.001)
    assert others.values["rfid"] == pytest.approx(own.values["rfid"], rel=1e-4)
    assert len(others.pictures) == 10


def test_an_identical_copy_is_perfect(folders, processor, tmp_path):
    originals = folders[0]
    copies = tmp_path / "copies"
    for path in originals.rglob("*.bmp"):
        target = copies / path.relative_to(originals).with_suffix(".png")
        target.parent.mkdir(parents=True, exist_ok=True)
        processor.crop(Image.open(path)).save(target)
    values = evaluate_reconstructions(open_source(originals), open_source(copies), options()).values
    assert values["ssim"] == pytest.approx(1) and values["psnr"] > 90
    assert values["not_measured"] == {
        "rfid": "its weights are downloaded; add rfid to --metrics",
        "lpips": "its weights are downloaded; add lpips to --metrics",
    }


def test_images_are_paired_by_path_then_by_name(folders, tmp_path):
    originals, rebuilt = map(open_source, folders)
    pairs = pairing(originals, rebuilt)
    for index, other in enumerate(pairs):
        assert originals.key(index).split(".")[0] == rebuilt.key(int(other)).split(".")[0]
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in folders[1].rglob("*.png"):
        path.rename(flat / path.name)
    found = pairing(originals, open_source(flat))
    assert [open_source(flat).key(int(other)) for other in found] == [
        originals.key(index).split("/")[1].replace("bmp", "png") for index in range(10)
    ]


def test_two_processes_equal_one(folders):
    from evotok_plugin.common.processes import Processes

    originals, rebuilt = map(open_source, folders)
    whole = evaluate_reconstructions(originals, rebuilt, options()).values
    parts = [[], []]
    for rank in range(2):
        from evotok_plugin.data.bad_samples import BadSamples
        from evotok_plugin.data.sources import Subset
        from evotok_plugin.evaluation import reconstructions
        from evotok_plugin.image_processing_evotok import EvoTokImageProcessor

        paired = Subset(rebuilt, pairing(originals, rebuilt))
        own = Processes(rank, 2, torch.device("cpu"))
        crop = EvoTokImageProcessor(size=whole["image_size"])
        batches = reconstructions._given(originals, paired, crop, options(), own, BadSamples(None, 0.0))
        parts[rank] = [index for batch in batches for index in batch.indices]
    assert sorted(parts[0] + parts[1]) == list(range(10)) and parts[0] == list(range(0, 10, 2))


def test_wrong_reconstructions_are_user_errors(folders, tmp_path):
    originals, rebuilt = folders

    def error(match):
        with pytest.raises(UserError, match=match):
            evaluate_reconstructions(open_source(originals), open_source(rebuilt), options())

    first = sorted(rebuilt.rglob("*.png"))[3]
    Image.new("RGB", (64, 64)).save(first)
    error("has 64 x 64 pixels, the first one 96 x 96|has 64 x 64 pixels, the first one")
    first.unlink()
    error("1 of 10 images have no reconstruction in .* first 'a/06'")
    for path in rebuilt.rglob("*.png"):
        path.unlink()
    Image.new("RGB", (64, 48)).save(rebuilt / "other.png")
    error("no image of .* has a reconstruction")
    Image.new("RGB", (64, 48)).save(rebuilt / "a" / "00.png")
    (rebuilt / "other.png").unlink()
    error("9 of 10 images have no reconstruction")


def test_the_command(folders, tmp_path, capsys):
    originals, rebuilt = map(str, folders)
    out = tmp_path / "out"
    assert main(["evaluate", originals, "--reconstructions", rebuilt, "-o", str(out), "--num_workers", "0"]) == 0
    printed = capsys.readouterr().out
    values = json.loads((out / "metrics.json").read_text())
    assert f"{values['psnr']:.2f} dB" in printed and "Not measured:" in printed and "* rfid: its weights" in printed
    assert np.array(Image.open(out / "grid.png")).std() > 0

    def error(*words):
        assert main(["evaluate", *words]) == 2
        return capsys.readouterr().err

    assert "--model has no effect with --reconstructions" in error(
        originals, "--reconstructions", rebuilt, "--model", "x"
    )
    assert "expected images to evaluate on, or --held_out RUN; got neither" in error("--reconstructions", rebuilt)
    assert "usage cannot be measured" in error(originals, "--reconstructions", rebuilt, "--metrics", "usage")
