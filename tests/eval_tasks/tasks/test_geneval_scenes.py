"""The drawing task: its documents, its answers, its baseline, and runs with drawing functions of known accuracy."""

import json
from functools import cache

import numpy as np
import pytest
from PIL import Image

from eval_tasks.tasks.geneval_scenes import task as geneval_scenes
from eval_tasks.tasks.geneval_scenes.prompts import derangement, make_documents
from evotok_plugin.errors import UserError
from evotok_plugin.scenes.captions import prompt_record
from evotok_plugin.scenes.scene import SKILLS, render, sample_scene

SKILL_ROWS = [{"skill": skill, "prompts": 20} for skill in SKILLS]


@cache
def documents() -> list[dict]:
    return make_documents(SKILL_ROWS, seed=20260312)


@cache
def scene_for(prompt: str):
    """A scene that matches the prompt."""
    skill = next(doc["tag"] for doc in documents() if doc["prompt"] == prompt)
    rng = np.random.default_rng(1)
    while True:
        scene = sample_scene(rng, skill)
        if prompt_record(scene, skill)["prompt"] == prompt:
            return scene


def perfect(prompt: str, seed: int) -> Image.Image:
    return render(scene_for(prompt))


def test_documents_are_reproducible_and_alternate_skills():
    docs = documents()
    assert docs == make_documents(SKILL_ROWS, seed=20260312)
    assert docs != make_documents(SKILL_ROWS, seed=1)
    assert len(docs) == 120 and [doc["index"] for doc in docs] == list(range(120))
    assert [doc["tag"] for doc in docs[:12]] == [*SKILLS, *SKILLS]
    for doc in docs:
        record = json.loads(doc["record"])
        assert (record["tag"], record["prompt"]) == (doc["tag"], doc["prompt"])
    colors = [doc["prompt"] for doc in docs if doc["tag"] == "colors"]
    assert len(set(colors)) == 20  # enough prompts: none repeats


def test_baseline_partners_are_a_derangement():
    docs = documents()
    partners = [json.loads(doc["baseline_record"])["prompt"] for doc in docs]
    assert sorted(partners) == sorted(doc["prompt"] for doc in docs)
    assert all(doc["prompt"] != partner for doc, partner in zip(docs, partners, strict=True))


def test_derangement_of_any_list():
    rng = np.random.default_rng(0)
    for _ in range(300):
        prompts = [str(rng.integers(6)) for _ in range(int(rng.integers(2, 30)))]
        most = max(map(prompts.count, prompts))
        if 2 * most > len(prompts):
            with pytest.raises(ValueError, match="too few others to be its partners"):
                derangement(prompts, rng)
            continue
        partner = derangement(prompts, rng)
        assert sorted(partner) == list(range(len(prompts)))
        assert all(prompts[index] != prompts[other] for index, other in enumerate(partner))


def test_answers_without_usable_images_are_rejected(tmp_path):
    for answer in ("a red circle", "[]", '{"images": []}', '{"images": [3]}', '{"text": ""}'):
        with pytest.raises(ValueError, match="expected .*images.* as JSON"):
            geneval_scenes.parse_images(answer)
    with pytest.raises(UserError, match="1 of 1 drawn images are missing"):
        geneval_scenes.parse_images(json.dumps({"images": [str(tmp_path / "gone.png")]}))
    broken = tmp_path / "broken.png"
    render(scene_for(documents()[0]["prompt"])).save(broken)
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(ValueError, match="cannot be read"):
        geneval_scenes.open_image(broken)


def test_one_document(tmp_path):
    doc = documents()[2]
    paths = []
    for number in range(4):
        image = perfect(doc["prompt"], 0) if number < 3 else Image.new("RGB", (48, 48), (150, 150, 150))
        paths.append(str(tmp_path / f"{number}.png"))
        image.save(paths[-1])
    results = geneval_scenes.process_results(doc, [json.dumps({"text": "", "images": paths})])
    assert set(results) == {"overall", "baseline", "counting"}
    assert results["counting"] == results["overall"]["score"] == 0.75
    last = results["overall"]["judgements"][-1]
    assert not last["correct"] and "found 0" in last["reason"] and last["image"] == paths[-1]


def test_every_prompt_can_be_fulfilled():
    detector = geneval_scenes.judge()
    for doc in documents():
        image = perfect(doc["prompt"], 0)
        verdict = geneval_scenes.evaluate(json.loads(doc["record"]), detector.detect(image), detector.rules)
        assert verdict.correct, (doc["prompt"], verdict.reason)


def test_a_perfect_drawer_scores_one(make_lm, evaluate, tmp_path):
    lm = make_lm(drawer=perfect, batch_size=8)
    results = evaluate(lm, ["geneval_scenes"], limit=24)["results"]["geneval_scenes"]
    for metric in ("overall", *SKILLS):
        assert results[f"{metric},none"] == 1.0
    assert results["baseline,none"] < 0.3
    (path,) = (tmp_path / "results/judgements").glob("*_geneval_scenes.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 96 and [row["index"] for row in rows] == sorted(row["index"] for row in rows)
    assert {"tag", "prompt", "image", "correct", "reason", "instances", "baseline_correct"} <= rows[0].keys()
    assert not hasattr(lm, "_model")  # lmms-eval freed it before scoring


def test_a_run_leaves_a_contact_sheet_with_model_and_settings(make_lm, evaluate, tmp_path):
    """Every third image is blank; the sheet, the judgements and the scores are those of the task."""
    numbers = iter(range(1000))
    lm = make_lm(
        drawer=lambda prompt, seed: perfect(prompt, 0) if next(numbers) % 3 else Image.new("RGB", (48, 48)),
        batch_size=8,
        guidance_scale=2.5,
    )
    results = evaluate(lm, ["geneval_scenes"], limit=12)["results"]["geneval_scenes"]
    (folder,) = (tmp_path / "results/drawn").iterdir()
    rows = [json.loads(line) for line in (folder / "judgements.jsonl").read_text().splitlines()]
    assert len(rows) == 48 and sum(not row["correct"] for row in rows) == 16
    scores = json.loads((folder / "scores.json").read_text())["scores"]
    assert scores["overall"]["value"] == results["overall,none"]
    page = (folder / "contact_sheet.html").read_text()
    assert "<dt>guidance_scale</dt><dd>2.5</dd>" in page and "<dt>weights</dt><dd>fake</dd>" in page
    assert page.count('<figure class="bad">') == 16 and page.count('<figure class="good">') == 32
    assert '<input type="checkbox" id="failures">' in page and "failures only (16 images)" in page
    assert Image.open(folder / "contact_sheet.png").width > 400


def test_a_blank_drawer_scores_zero(make_lm, evaluate):
    results = evaluate(make_lm(batch_size=8), ["geneval_scenes"], limit=12)["results"]["geneval_scenes"]
    assert results["overall,none"] == results["baseline,none"] == 0.0


def test_a_drawer_that_ignores_its_prompt_scores_the_baseline():
    rng = np.random.default_rng(3)
    items = []
    for doc in documents():
        skill = SKILLS[int(rng.integers(len(SKILLS)))]
        image = render(sample_scene(rng, skill))
        detector = geneval_scenes.judge()
        instances = detector.detect(image)
        verdicts = [
            geneval_scenes.evaluate(json.loads(doc[key]), instances, detector.rules).correct
            for key in ("record", "baseline_record")
        ]
        items.append(verdicts)
    own, baseline = np.mean(items, axis=0)
    assert abs(own - baseline) < 0.12 and 0.02 < baseline < 0.3
