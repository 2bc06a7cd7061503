import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from llava_ext.cli import main
from llava_ext.commands import draw as draw_command
from llava_ext.modeling_evotok_llava import EvoTokLlavaForConditionalGeneration

RING = "a photo of a ring"


@pytest.fixture
def draw(model_folder, tmp_path, capsys):
    """Run the command and return its exit code and stderr."""

    def run(*arguments):
        flags = [] if "-o" in arguments else ["-o", tmp_path]
        code = main(["draw", *map(str, [*arguments, "--model", model_folder, *flags])])
        return code, capsys.readouterr().err

    return run


def pixels(path):
    return np.asarray(Image.open(path))


def test_png_text_records_how_an_image_was_drawn(draw, tmp_path, model_folder):
    assert draw("a naïve ring, 環", "-n", 2, "--seed", 3, "--top_p", 0.9, "--temperature", "1,0.9,0.8,0.7")[0] == 0
    text = Image.open(tmp_path / "a_naïve_ring_環_seed4.png").text
    assert (text["prompt"], text["seed"], text["model"]) == ("a naïve ring, 環", "4", model_folder.name)
    settings = json.loads(text["settings"])
    assert settings["top_p"] == 0.9 and settings["temperature"] == [1, 0.9, 0.8, 0.7] and settings["top_k"] == 0
    assert json.loads(Image.open(tmp_path / "a_naïve_ring_環_grid.png").text["settings"])["num_images"] == 2
    assert not list(tmp_path.glob(".*"))


def test_weights_can_have_another_dtype_which_is_recorded(draw, tmp_path):
    assert draw(RING, "--dtype", "bfloat16")[0] == 0 and draw(RING, "-o", tmp_path / "auto")[0] == 0
    name = "a_photo_of_a_ring_seed0.png"
    settings = [json.loads(Image.open(path).text["settings"]) for path in (tmp_path / name, tmp_path / "auto" / name)]
    assert settings[0]["dtype"] == "bfloat16" and "dtype" not in settings[1]


def test_small_images_are_enlarged_by_a_whole_factor(draw, tmp_path, tiny_mllm):
    draw(RING, "-n", 2)
    for scale in (1, 3):
        draw(RING, "-n", 2, "--scale", scale, "-o", tmp_path / str(scale))
    name = "a_photo_of_a_ring_seed0.png"
    raw, enlarged = pixels(tmp_path / "1" / name), pixels(tmp_path / name)
    assert raw.shape == (48, 48, 3) and enlarged.shape == (288, 288, 3)  # the least multiple from 256 on
    np.testing.assert_array_equal(enlarged, raw.repeat(6, axis=0).repeat(6, axis=1))
    np.testing.assert_array_equal(pixels(tmp_path / "3" / name), raw.repeat(3, axis=0).repeat(3, axis=1))
    assert [Image.open(tmp_path / part / name).text["scale"] for part in (".", "1", "3")] == ["6", "1", "3"]
    assert pixels(tmp_path / "a_photo_of_a_ring_grid.png").shape == (288, 2 * 288 + 4, 3)
    model, processor = tiny_mllm
    read = processor.image_processor([tmp_path / part / name for part in (".", "1", "3")]).pixel_values
    codes = model.vision_tower.encode(read).codes
    assert (codes == codes[:1]).all()


def test_only_the_same_image_is_overwritten(draw, tmp_path):
    for _ in range(2):
        draw(RING)
    assert [path.name for path in tmp_path.iterdir()] == ["a_photo_of_a_ring_seed0.png"]
    first = (tmp_path / "a_photo_of_a_ring_seed0.png").read_bytes()
    draw(RING, "--top_k", 5)
    draw("A photo of a ring!")
    assert len(list(tmp_path.iterdir())) == 3 and (tmp_path / "a_photo_of_a_ring_seed0.png").read_bytes() == first


def test_a_foreign_file_is_never_overwritten(draw, tmp_path):
    mine = tmp_path / "a_photo_of_a_ring_seed0.png"
    mine.write_text("dear")
    assert draw(RING)[0] == 0
    assert mine.read_text() == "dear" and Image.open(tmp_path / "a_photo_of_a_ring_seed0_2.png").text["seed"] == "0"


def test_an_image_does_not_depend_on_its_batch(draw, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"a photo of two squares\n\n{RING}\n")
    draw("a red circle", "--prompts", prompts, "-n", 2, "-o", tmp_path / "many", "--batch_size", 4)
    draw(RING, "--seed", 1, "-o", tmp_path / "one")
    assert len(list((tmp_path / "many").iterdir())) == 3 * (2 + 1)
    many, one = (pixels(tmp_path / folder / "a_photo_of_a_ring_seed1.png").astype(int) for folder in ("many", "one"))
    np.testing.assert_allclose(many, one, atol=1)  # the decoder's sums round differently in another batch


def test_ctrl_c_keeps_finished_images(draw, tmp_path, monkeypatch):
    generate, calls = EvoTokLlavaForConditionalGeneration.generate_images, []

    def interrupted(model, *arguments, **settings):
        calls.append(settings)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(model, *arguments, **settings)

    monkeypatch.setattr(EvoTokLlavaForConditionalGeneration, "generate_images", interrupted)
    code, error = draw(RING, "-n", 4, "--batch_size", 1)
    assert code == 130 and "2 of 4 images were drawn" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"a_photo_of_a_ring_seed{seed}.png" for seed in (0, 1)]


def test_a_preview_shows_the_batch_and_overwrites_only_previews(draw, tmp_path):
    preview = tmp_path / "preview.png"
    for _ in range(2):
        assert draw(RING, "-n", 2, "--preview", preview, "--preview_every", 2)[0] == 0
    grid = pixels(preview)
    assert grid.shape == pixels(tmp_path / "a_photo_of_a_ring_grid.png").shape
    assert (grid[-1, -1] == 128).all()  # the last position is never drawn in a preview
    drawn = tmp_path / "a_photo_of_a_ring_seed0.png"
    code, error = draw(RING, "--preview", drawn)
    assert code == 2 and "exists and was not written as a preview" in error


def test_previews_are_written_at_the_default_interval_of_any_model(draw, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(draw_command, "write_png", lambda image, path, text: shown.append(np.asarray(image)))
    code, error = draw(RING, "--preview", tmp_path / "preview.png")
    assert code == 0 and len(shown) == 4  # after 2, 4, 6 and 8 of the 9 positions
    assert [int((picture == 128).all(axis=2).sum()) // 96**2 for picture in shown] == [7, 5, 3, 1]  # gray positions
    assert f"preview: {tmp_path / 'preview.png'}, written after every 2 of 9 positions" in error


def test_an_interval_without_any_preview_is_rejected(draw, tmp_path):
    code, error = draw(RING, "--preview", tmp_path / "preview.png", "--preview_every", 9)
    assert code == 2 and "--preview_every 9: expected less than 9" in error
    assert draw(RING, "--preview", tmp_path / "preview.png", "--preview_every", 8)[0] == 0
    assert (tmp_path / "preview.png").is_file()
    code, error = draw(RING, "--preview_every", 2)
    assert code == 2 and "--preview_every 2 needs --preview FILE" in error


def test_speculation_draws_the_same_files(draw, tmp_path):
    assert draw(RING, "-n", 2)[0] == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert draw(RING, "-n", 2, "--speculate", 4)[0] == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before and len(before) == 3
    code, error = draw(RING, "--speculate", 0)
    assert code == 2 and "--speculate must be at least 1, got 0" in error


def test_the_best_candidate_is_kept_and_recorded(draw, tmp_path):
    for batch_size in (16, 2):
        assert draw(RING, "-n", 2, "--best_of", 3, "--batch_size", batch_size)[0] == 0
    names = ["a_photo_of_a_ring_grid.png", "a_photo_of_a_ring_seed0.png", "a_photo_of_a_ring_seed1.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names  # the second run replaced the files
    for seed in (0, 1):
        settings = json.loads(Image.open(tmp_path / f"a_photo_of_a_ring_seed{seed}.png").text["settings"])
        assert (settings["best_of"], settings["judge"]) == (3, "reading")
        assert settings["candidate"] in (0, 1, 2) and round(settings["score"], 3) == settings["score"]
        assert (settings["candidate_seed"] == seed) == (settings["candidate"] == 0)
        alone = tmp_path / str(seed)
        draw(RING, "--seed", settings["candidate_seed"], "-o", alone)
        (path,) = alone.iterdir()
        drawn = pixels(tmp_path / f"a_photo_of_a_ring_seed{seed}.png").astype(int)
        np.testing.assert_allclose(drawn, pixels(path).astype(int), atol=1)
    grid = json.loads(Image.open(tmp_path / names[0]).text["settings"])
    assert grid["best_of"] == 3 and "candidate" not in grid


class Darkness:
    """A reward: minus the mean of the pixels."""

    def __call__(self, prompts, images):
        return [-float(np.asarray(image).mean()) for image in images]


def test_a_judge_selects(draw, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "test_rewards", SimpleNamespace(Darkness=Darkness))
    spec = "test_rewards:Darkness=2"
    assert draw(RING, "--best_of", 4, "--judge", spec)[0] == 0
    (path,) = tmp_path.iterdir()
    settings = json.loads(Image.open(path).text["settings"])
    assert settings["judge"] == spec and settings["score"] == pytest.approx(-2 * pixels(path).mean(), abs=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "at least one prompt"),
        ([RING, "--best_of", 0], "best_of must be a whole number from 1 to 1024, got 0"),
        ([RING, "--judge", "absent", "--best_of", 2], "unknown reward 'absent'"),
        ([RING, "--judge", "builtins:print"], "a judge has no effect with best_of=1"),
        ([" "], "none empty"),
        (["ring " * 40000], "shorten the prompt"),
        ([RING, "--guidance_scale", 0.5], "guidance_scale must be at least 1 and at most 1000, got 0.5"),
        ([RING, "--guidance_scale", "nan"], "guidance_scale must be at least 1"),
        ([RING, "--top_p", 0], "top_p"),
        ([RING, "--min_p", 2], "min_p"),
        ([RING, "--temperature", "1,0.5"], "temperature has 2 values, but 4 levels"),
        ([RING, "-n", 0], "--num_images must be at least 1, got 0"),
        ([RING, "--batch_size", 0], "--batch_size must be at least 1"),
        ([RING, "--scale", 0], "--scale must be at least 1 and at most 341 for images of 48 pixels, got 0"),
        ([RING, "--scale", 342], "--scale must be at least 1 and at most 341"),
        ([RING, "--prompts", "absent.txt"], "--prompts absent.txt cannot be read"),
        (["caf\udce9"], "the text is not valid Unicode at character"),
    ],
)
def test_bad_input_is_reported_in_one_line_and_nothing_is_written(draw, tmp_path, arguments, message):
    code, error = draw(*arguments)
    last = error.strip().splitlines()[-1]
    assert code == 2 and last.startswith("error: ") and message in last
    assert not list(tmp_path.iterdir())


def test_a_file_of_prompts_that_never_ends_is_rejected(draw, monkeypatch):
    monkeypatch.setattr("llava_ext.commands.draw._LONGEST_PROMPTS", 1000)
    code, error = draw("--prompts", "/dev/zero")
    assert code == 2 and "--prompts /dev/zero is larger than" in error


@pytest.mark.parametrize("flags", [["--guidance_schedule", "quadratic"], ["--temperature", "warm"]])
def test_flags_of_the_wrong_type_are_named(draw, flags, capsys):
    with pytest.raises(SystemExit) as exit:
        draw(RING, *flags)
    assert exit.value.code == 2 and flags[0] in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_reported_before_drawing(draw, tmp_path):
    (tmp_path / "file").write_text("")
    code, error = draw(RING, "-o", tmp_path / "file")
    assert code == 2 and "is not a folder" in error and "drawing" not in error
