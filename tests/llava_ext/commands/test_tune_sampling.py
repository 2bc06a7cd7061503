"""`evotok-llava tune-sampling` on a tiny model with a judge that measures brightness."""

import json
import shutil
import sys
import types

import numpy as np
import pytest

import llava_ext.commands.tune_sampling as command
from llava_ext.cli import main
from llava_ext.model_folder import INCLUDED_MODEL, load_model

SETTINGS = "plain: {guidance_scale: 1}\nearly: {guidance_interval: [0, 0.5]}\ngreedy: {temperature: 0}\n"


@pytest.fixture
def folder(model_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    return folder


@pytest.fixture
def judge(monkeypatch):
    """A judge at the dotted path `brightness:judge`; `calls` are the prompts that it has judged."""
    module = types.ModuleType("brightness")
    module.calls = []

    def judge(prompts, images):
        module.calls.extend(prompts)
        return [float(np.asarray(image).mean() / 255) for image in images]

    module.judge = judge
    monkeypatch.setitem(sys.modules, "brightness", module)
    return module


@pytest.fixture
def tune(folder, judge, tmp_path):
    """Run the command; returns its exit code."""
    (tmp_path / "prompts.jsonl").write_text(
        '{"prompt": "a ring", "tag": "single"}\n{"prompt": "two rings", "tag": "count"}\n'
    )
    (tmp_path / "settings.yaml").write_text(SETTINGS)

    def tune(*flags, model=folder):
        files = {"prompts": "prompts.jsonl", "settings": "settings.yaml", "journal": "journal.jsonl"}
        paths = [part for name, file in files.items() for part in (f"--{name}", str(tmp_path / file))]
        return main(["tune-sampling", str(model), *paths, "--judge", "brightness:judge", "-n", "2", *flags])

    return tune


def generation_config(folder):
    return json.loads((folder / "generation_config.json").read_text())


def test_the_best_settings_are_written(tune, folder, judge, capsys, monkeypatch):
    before, written = generation_config(folder), {path.name: path.read_bytes() for path in folder.iterdir()}
    model, processor = load_model(folder)
    greedy = model.eval().generate_images(["a ring", "two rings"], processor, temperature=0)  # of any seed
    wanted = [image.tobytes() for image in greedy]
    monkeypatch.setattr(judge, "judge", lambda prompts, images: [image.tobytes() in wanted for image in images])
    assert tune("--batch_size", "2") == 0
    output = capsys.readouterr().out
    assert "best: greedy" in output and f"written to {folder / 'generation_config.json'}" in output
    assert all(name in output for name in ("single", "count", "overall", "current", "plain", "early"))
    after = generation_config(folder)
    assert after == before | {"image_generation": before["image_generation"] | {"temperature": 0.0}}
    changed = {name for name, content in written.items() if (folder / name).read_bytes() != content}
    assert changed == {"generation_config.json"} and {path.name for path in folder.iterdir()} == written.keys()


def test_a_dry_run_writes_nothing(tune, folder, capsys):
    before = (folder / "generation_config.json").read_bytes()
    assert tune("--dry_run") == 0
    assert (folder / "generation_config.json").read_bytes() == before
    assert "unchanged (--dry_run)" in capsys.readouterr().out


def test_an_interrupted_search_resumes(tune, judge, capsys, monkeypatch):
    judged = judge.judge

    def interrupting(prompts, images):
        if len(judge.calls) == 12:
            raise KeyboardInterrupt
        return judged(prompts, images)

    monkeypatch.setattr(judge, "judge", interrupting)
    assert tune("--dry_run", "--batch_size", "2") == 130
    assert "the same command resumes" in capsys.readouterr().err
    monkeypatch.setattr(judge, "judge", judged)
    assert tune("--dry_run", "--batch_size", "2") == 0
    resumed = capsys.readouterr().out
    assert len(judge.calls) == 4 * 4  # four candidates, four images
    assert tune("--dry_run", "--batch_size", "2") == 0  # finished: all scores come from the journal
    assert capsys.readouterr().out == resumed and len(judge.calls) == 16


def test_the_score_is_that_of_generate_images(tune, folder, judge, capsys, tmp_path):
    assert tune("--dry_run") == 0
    model, processor = load_model(folder)
    prompts = ["a ring", "two rings"] * 2
    images = model.eval().generate_images(prompts, processor, seed=[0, 1, 2, 3], guidance_scale=1)
    scores = judge.judge(prompts, images)
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| plain"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:4] == ["4", f"{np.mean(scores[::2]):.3f}", f"{np.mean(scores[1::2]):.3f}"]


def test_the_default_journal_is_in_the_working_folder(tune, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--prompts", "prompts.jsonl", "--settings", "settings.yaml", "--judge", "brightness:judge", "-n", "2"]
    assert main(["tune-sampling", "model", *flags, "--dry_run"]) == 0
    (journal,) = (tmp_path / "outputs/tune_sampling").iterdir()
    assert journal.name.startswith("model-") and journal.suffix == ".jsonl"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_images", "1"], "expected at least 2 images per skill, got 1 for single"),
        (["--batch_size", "0"], "--batch_size must be at least 1"),
        (["--seed", "-1"], "seed must be from 0"),
        (["--judge", "unknown"], "unknown reward 'unknown'"),
        (["--journal", "journal.txt"], "--journal journal.txt: expected one of .jsonl"),
        (["--prompts", "missing.jsonl"], "missing.jsonl cannot be read"),
    ],
)
def test_mistakes_are_reported(tune, judge, capsys, flags, message):
    assert tune(*flags) == 2
    assert message in capsys.readouterr().err and not judge.calls


def test_the_included_model_is_only_tuned_as_a_dry_run(tune, judge, capsys):
    assert tune(model=INCLUDED_MODEL) == 2
    assert "is the model included in the package" in capsys.readouterr().err and not judge.calls


def test_a_folder_that_cannot_be_written_is_reported_before_the_search(tune, folder, judge, capsys, monkeypatch):
    monkeypatch.setattr(command, "open_model", lambda *_: pytest.fail("the model was loaded"))
    config = folder / "generation_config.json"
    config.unlink()
    config.mkdir()
    assert tune() == 2
    assert "MODEL" in capsys.readouterr().err and not judge.calls
