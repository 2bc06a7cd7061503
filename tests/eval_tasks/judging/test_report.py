"""Contact sheets: the head with model and settings, and the filter that shows only the failures."""

import argparse
import json

import pytest
from PIL import Image

from eval_tasks.judging import drawn_with
from eval_tasks.judging.drawn_run import open_drawn_run, store_drawn_run
from eval_tasks.judging.report import write_report
from eval_tasks.judging.scores import Judgement, summarize
from llava_ext.serving.image_files import write_png

SETTINGS = {"guidance_scale": 3.0, "temperature": [0.5, 0.5], "top_k": [1, 2], "negative_prompt": None}


def judgement(index, sample, correct, image):
    return Judgement(
        index=index, sample=sample, image=image, prompt=f"prompt {index}", score=float(correct), correct=correct,
        marks={"colors" if index < 2 else "counting": [float(correct)]}, reason="" if correct else "found <none>",
    )  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """Three prompts with two images each; images record how they were drawn."""
    answers = []
    for index in range(3):
        paths = [tmp_path / f"{index}_{sample}.png" for sample in range(2)]
        for path in paths:
            chunks = {"prompt": "p", "seed": path.stem[-1], "model": "abc123", "settings": json.dumps(SETTINGS)}
            write_png(Image.new("RGB", (48, 48), "red"), path, chunks)
        answers.append(({"index": index}, json.dumps({"images": list(map(str, paths))})))
    args = argparse.Namespace(model="evotok", model_args="pretrained=a<b>", gen_kwargs=None, limit=3)
    return store_drawn_run(tmp_path / "run", "geneval_scenes", answers, about=drawn_with.of_command_line(args))


def test_the_head_has_the_model_and_the_settings(run):
    expected = {
        "model": "evotok", "model arguments": "pretrained=a<b>", "limit": "3", "guidance_scale": "3.0",
        "temperature": "0.5", "top_k": "[1, 2]", "negative_prompt": "none", "weights": "abc123",
    }  # fmt: skip
    assert run.about == expected and open_drawn_run(run.folder).about == expected


def test_settings_that_differ_are_various(run, tmp_path):
    chunks = {"settings": json.dumps({**SETTINGS, "guidance_scale": 1.0}), "model": "abc123"}
    write_png(Image.new("RGB", (8, 8)), tmp_path / "other.png", chunks)
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    first = run.folder / run.drawn[0].image
    rows = drawn_with.of_images([first, tmp_path / "other.png"])
    assert rows["guidance_scale"] == drawn_with.VARIOUS and rows["weights"] == "abc123"
    assert set(drawn_with.of_images([first, tmp_path / "plain.png"]).values()) == {drawn_with.VARIOUS}
    assert drawn_with.of_images([tmp_path / "plain.png"]) == {} and drawn_with.of_command_line(None) == {}


def test_the_filter_hides_what_is_correct(run, tmp_path):
    """Of three prompts, one is correct in all images and one skill in all prompts."""
    verdicts = {(0, 0): True, (0, 1): True, (1, 0): True, (1, 1): False, (2, 0): True, (2, 1): True}
    items = [judgement(item.index, item.sample, verdicts[item.index, item.sample], item.image) for item in run.drawn]
    write_report(tmp_path, run, items, summarize(items, "skills"))
    page = (tmp_path / "contact_sheet.html").read_text()
    assert "failures only (1 images)" in page or "failures only (1 image)" in page
    assert page.count('<article class="passed">') == 2 and page.count("<article>") == 1
    assert '<h2 class="passed">counting</h2>' in page and "<h2>colors</h2>" in page
    assert "pretrained=a&lt;b&gt;" in page and "found &lt;none&gt;" in page
    assert "#failures:checked ~ section .good" in page


def test_without_failures_there_is_no_filter(run, tmp_path):
    items = [judgement(item.index, item.sample, True, item.image) for item in run.drawn]
    write_report(tmp_path, run, items, summarize(items, "skills"))
    assert 'id="failures"' not in (tmp_path / "contact_sheet.html").read_text()
