"""The scene detector on rendered, degraded, touching and damaged scenes."""

import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageDraw

from eval_tasks.judging.scene_detector import SceneDetector, degrading, lab, main, measure
from evotok_plugin.scenes.scene import BACKGROUND, COLORS, SHAPES, Scene, SceneObject, render

DETECTOR = SceneDetector()


def kinds(image: Image.Image) -> Counter:
    return Counter((item.color, item.label) for item in DETECTOR.detect(image))


@pytest.mark.parametrize(("degradation", "least"), [(None, 0.995), ((0.7, 8.0), 0.99), ((1.2, 10.0), 0.98)])
def test_accuracy_on_whole_scenes(degradation, least):
    accuracy = measure(DETECTOR, 400, seed=11, transform=degradation and degrading(*degradation))
    assert accuracy.share >= least, accuracy.faults


def test_every_shape_in_every_color_on_every_background():
    for ground in (BACKGROUND, (120, 120, 120)):
        for shape in SHAPES:
            for color in COLORS:
                image = render(Scene((SceneObject(shape, color, 0.5, 0.5, 0.25),), ground))
                (found,) = DETECTOR.detect(image)
                assert (found.label, found.color) == (shape, color)
                assert found.score > 0.85 and found.mask.shape == (48, 48)
                assert np.allclose(found.box, (18, 18, 30, 30), atol=2.1), (shape, found.box)


def test_works_at_other_sizes():
    scene = Scene((SceneObject("ring", "red", 0.25, 0.25, 0.25), SceneObject("cross", "blue", 0.75, 0.7, 0.25)))
    for size in (32, 96, 200):
        assert kinds(render(scene, size)) == {("red", "ring"): 1, ("blue", "cross"): 1}


def test_touching_objects_of_two_colors_are_two():
    image = Image.new("RGB", (48, 48), BACKGROUND)
    draw = ImageDraw.Draw(image)
    draw.rectangle((8, 16, 20, 28), fill=COLORS["red"])
    draw.rectangle((21, 16, 33, 28), fill=COLORS["blue"])
    assert kinds(image) == {("red", "square"): 1, ("blue", "square"): 1}


# The smallest gap in sampled scenes is 0.013 of the side.
@pytest.mark.parametrize(("shape", "gap"), [*((shape, 0.013) for shape in SHAPES), ("circle", 0.0), ("cross", 0.0)])
def test_adjacent_objects_of_one_color_are_two(shape, gap):
    for x in np.linspace(0.33, 0.36, 7):
        pair = [SceneObject(shape, "red", x + shift, 0.5, 0.27) for shift in (0.0, 0.27 + gap)]
        assert kinds(render(Scene(tuple(pair)))) == {("red", shape): 2}, x


def test_specks_blank_images_and_shapeless_blobs_are_ignored():
    blank = Image.new("RGB", (48, 48), BACKGROUND)
    assert DETECTOR.detect(blank) == []
    speckled = blank.copy()
    for x, y in ((3, 3), (20, 30), (21, 30), (40, 12)):
        speckled.putpixel((x, y), COLORS["red"])
    assert DETECTOR.detect(speckled) == []
    bar = blank.copy()
    ImageDraw.Draw(bar).rectangle((4, 20, 43, 22), fill=COLORS["green"])
    assert DETECTOR.detect(bar) == []


def test_unnamed_colors_are_none_and_stray_pixels_do_not_split_an_object():
    image = Image.new("RGB", (48, 48), BACKGROUND)
    ImageDraw.Draw(image).rectangle((18, 18, 29, 29), fill=(30, 230, 230))
    assert kinds(image) == {(None, "square"): 1}
    image = render(Scene((SceneObject("circle", "red", 0.5, 0.5, 0.27),)))
    for x, y in ((22, 22), (25, 26), (24, 21)):
        image.putpixel((x, y), COLORS["red"])
    assert kinds(image) == {("red", "circle"): 1}


def test_an_object_cut_by_the_border_is_not_an_error():
    image = Image.new("RGB", (48, 48), BACKGROUND)
    ImageDraw.Draw(image).ellipse((-6, 16, 10, 32), fill=COLORS["blue"])
    DETECTOR.detect(image)


def test_lab_of_white_black_and_red():
    expected = [[100, 0, 0], [0, 0, 0], [53.24, 80.09, 67.20]]
    assert np.allclose(lab(np.array([[255, 255, 255], [0, 0, 0], [255, 0, 0]])), expected, atol=0.05)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--scenes", "0"], "--scenes must be at least 1"),
        (["--seed=-1"], "seed must be from 0"),
        (["--image_size=-1"], "--image_size must be from 1 to 4096, got -1"),
        (["--image_size", str(10**20)], "--image_size must be from 1 to 4096"),
        (["--degrade", "nan", "0"], "--degrade: expected two numbers of at least 0"),
    ],
)
def test_numbers_out_of_range_are_rejected(capsys, flags, message):
    assert main(flags) == 2
    assert message in capsys.readouterr().err


def test_command_reports_accuracy(monkeypatch, capsys, tiny_evotok_folder):
    for options, right in (([], "12 of 12"), (["--degrade", "0.5", "4"], "12 of 12"), (["--tokenizer"], "0 of 12")):
        folder = [str(tiny_evotok_folder)] if options == ["--tokenizer"] else []  # random weights
        monkeypatch.setattr(sys, "argv", ["scene_detector", "--scenes", "12", *options, *folder])
        main()
        assert f"{right} scenes right" in capsys.readouterr().out
