"""mmbench_scenes, and upstream's MMBench on a local folder in its format."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest

from eval_tasks.registration import DATA_ROOT_VARIABLE
from eval_tasks.tasks.mmbench_scenes import task as mmbench_scenes
from evotok_plugin.scenes.questions import MULTIPLE_CHOICE_PROMPT, mmbench_rows


@pytest.fixture(scope="module")
def questions() -> datasets.Dataset:
    rows = datasets.Dataset.from_list([{"questions": 400, "seed": 20260312, "image_size": 48}])
    return mmbench_scenes.process_docs(rows)


def knows(rows):
    """A function that gives the right letter for the text and image of every question."""
    letters = {(row["question"], np.asarray(row["image"]).tobytes()): row["answer"] for row in rows}

    def answer(text, images):
        (image,) = images
        return next(
            letter
            for (question, pixels), letter in letters.items()
            if question in text and pixels == np.asarray(image).tobytes()
        )

    return answer


def test_documents(questions):
    assert len(questions) == 400
    for doc in questions:
        choices = mmbench_scenes.options(doc)
        assert doc["answer"] in choices and len(choices) in (2, 4)
        lines = mmbench_scenes.doc_to_text(doc).split("\n")
        assert lines[0] == doc["question"]
        assert lines[1:-1] == [f"{letter}. {text}" for letter, text in choices.items()]
        assert lines[-1] == MULTIPLE_CHOICE_PROMPT
        (image,) = mmbench_scenes.doc_to_visual(doc)
        assert image.mode == "RGB" and image.size == (48, 48)


def test_hint_comes_first(questions):
    doc = {**questions[0], "hint": "Look closely."}
    assert mmbench_scenes.doc_to_text(doc).startswith(f"Look closely.\n{doc['question']}\n")


def test_scores_of_one_document(questions):
    doc = questions[0]
    choices = mmbench_scenes.options(doc)
    wrong = next(letter for letter in choices if letter != doc["answer"])
    for answer, hit in ((doc["answer"], 1.0), (wrong, 0.0), ("who knows?", 0.0), (choices[doc["answer"]], 1.0)):
        results = mmbench_scenes.process_results(doc, [answer])
        assert results == {"overall": hit, doc["category"]: hit, "chance": 1 / len(choices)}


def test_a_perfect_reader_and_one_that_always_answers_a(make_lm, evaluate, questions):
    first = questions.select(range(40))
    results = evaluate(make_lm(knows(first), batch_size=8), ["mmbench_scenes"], limit=40)["results"]["mmbench_scenes"]
    categories = set(first["category"])
    for metric in ("overall", *categories):
        assert results[f"{metric},none"] == 1.0
    assert results["chance,none"] == pytest.approx(np.mean([1 / len(mmbench_scenes.options(doc)) for doc in first]))
    results = evaluate(make_lm(), ["mmbench_scenes"], limit=40)["results"]["mmbench_scenes"]
    assert results["overall,none"] == pytest.approx(first["answer"].count("A") / 40)


def test_upstream_mmbench_reads_a_local_folder(make_lm, evaluate, tmp_path, monkeypatch, lmms_eval_tasks):
    rows = mmbench_rows(12, np.random.default_rng(5), 48)
    folder = tmp_path / "data/lmms-lab-encoder/MMBench"
    (folder / "en").mkdir(parents=True)
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    dev = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    dev.to_parquet(folder / "en/dev-00000-of-00001.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: en\n  data_files:\n  - split: dev\n    path: en/dev-*.parquet\n---\n"
    )
    monkeypatch.setenv(DATA_ROOT_VARIABLE, str(tmp_path / "data"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    upstream = Path(lmms_eval_tasks.__file__).parent / "mmbench"
    results = evaluate(make_lm(knows(rows)), ["mmbench_en_dev_static"], include_path=str(upstream))
    assert results["results"]["mmbench_en_dev_static"]["gpt_eval_score,none"] == 100.0
    details = json.loads((tmp_path / "results/submissions/mmbench_en_dev_static_results.json").read_text())
    assert details["overall_acc"] == 1.0
