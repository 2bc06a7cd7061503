"""Drawn images of several processes in one folder."""

import errno
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evotok_plugin.common import files
from evotok_plugin.errors import UserError
from llava_ext.serving.image_files import Provenance, read_png_text, write_drawn


def image_of(prompt):
    noise = np.random.default_rng(len(prompt)).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def draw(folder, prompt, count, barrier=None):
    for seed in range(count):
        if barrier is not None:
            barrier.wait()
        write_drawn(image_of(prompt), folder, f"a_cat_seed{seed}", Provenance(prompt, seed, "model", {}, "weights"))


def prompts_in(folder):
    return sorted((text["prompt"], text["seed"]) for path in folder.iterdir() if (text := read_png_text(path)))


@pytest.mark.parametrize("links", [True, False])
def test_processes_that_draw_into_one_folder_lose_no_image(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(files.os, "link", _refuse)
    context, prompts, count = multiprocessing.get_context("fork"), ["a cat!", "a cat?", "A cat.", "a cat;"], 40
    barrier = context.Barrier(len(prompts))
    drawing = [context.Process(target=draw, args=(tmp_path, prompt, count, barrier)) for prompt in prompts]
    for process in drawing:
        process.start()
    for process in drawing:
        process.join()
    assert prompts_in(tmp_path) == sorted((prompt, str(seed)) for prompt in prompts for seed in range(count))
    assert not list(tmp_path.glob(".*"))


def _refuse(source, target):
    if Path(target).exists():
        raise FileExistsError(errno.EEXIST, "File exists", str(target))
    raise OSError(errno.EPERM, "Operation not permitted")


def test_processes_that_draw_the_same_image_share_one_file(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    drawing = [context.Process(target=draw, args=(tmp_path, "a cat", 40, barrier)) for _ in range(2)]
    for process in drawing:
        process.start()
    for process in drawing:
        process.join()
    assert prompts_in(tmp_path) == sorted(("a cat", str(seed)) for seed in range(40))


def test_a_name_of_the_greatest_length_can_be_drawn(tmp_path):
    name = "x" * 251
    assert write_drawn(image_of("x"), tmp_path, name, Provenance("x", 0, "m", {}, "w")).name == f"{name}.png"
    with pytest.raises(UserError, match="cannot be written: File name too long"):
        write_drawn(image_of("x"), tmp_path, name, Provenance("y", 0, "m", {}, "w"))
    assert [path.name for path in tmp_path.iterdir()] == [f"{name}.png"]


def test_an_image_of_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(UserError, match="a.png cannot be written: No space left"):
        write_drawn(image_of("x"), tmp_path, "a", Provenance("x", 0, "m", {}, "w"))
    assert not list(tmp_path.iterdir())
