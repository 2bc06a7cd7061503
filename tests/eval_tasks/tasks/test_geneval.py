"""GenEval's judge on streams of images, and the task in lmms-eval with several drawing models."""

import json
import shutil
import weakref
from dataclasses import replace

import judges
import numpy as np
import pytest
from PIL import Image, ImageFile

from eval_tasks.judging.colors import ColorClassifier, Crop
from eval_tasks.judging.detectors import Mask2FormerDetector
from eval_tasks.judging.drawn_run import Drawn, open_drawn_run, store_drawn_run
from eval_tasks.judging.judge_run import judge_run
from eval_tasks.judging.options import JudgeOptions
from eval_tasks.judging.rules import GENEVAL_RULES, Instance, evaluate
from eval_tasks.judging.vocabulary import CLASSES, COLORS
from eval_tasks.reporting.card import make_card
from eval_tasks.reporting.published import card_rows, published
from eval_tasks.reporting.results import read_results_file
from eval_tasks.reporting.runs import make_run
from eval_tasks.tasks.geneval import task as geneval
from eval_tasks.tasks.geneval.prompts import geneval_records


class Oracle:
    """A detector and color classifier that read the number of a record from an image's top left pixel, and detect all
    objects of the record, or one fewer of each if `spoil(number)`."""

    rules, classes = GENEVAL_RULES, CLASSES

    def __init__(self, spoil=lambda number: False) -> None:
        self.records, self.spoil = geneval_records(), spoil
        self.batches, self.crop_batches = [], []

    def detect_batch(self, images):
        self.batches.append(len(images))
        return [self._found(number_of(image)) for image in images]

    def _found(self, number: int) -> list[Instance]:
        found = []
        for place, clause in enumerate(self.records[number]["include"]):
            x, y = {"left of": (0, 30), "right of": (60, 30), "above": (30, 0), "below": (30, 60)}.get(
                clause.get("position", [""])[0], (30, 30) if place == 0 else (0, 0)
            )
            for _ in range(clause["count"] - self.spoil(number)):
                box = (float(x), float(y), float(x + 4), float(y + 4))
                found.append(Instance(clause["class"], 0.95, box, np.full((64, 64), number, np.int32)))
        return found

    def prepare(self, image, instance) -> Crop:
        return Crop((number_of(image), instance.label), instance.label)

    def classify(self, crops):
        self.crop_batches.append(len(crops))
        return [
            next(clause["color"] for clause in self.records[crop.pixels[0]]["include"] if clause["class"] == crop.label)
            for crop in crops
        ]


def numbered(number: int) -> Image.Image:
    return Image.new("RGB", (64, 64), (number // 256, number % 256, 0))


def number_of(image: Image.Image) -> int:
    high, low, _ = image.getpixel((0, 0))
    return 256 * high + low


def drawn_for(document: dict, sample: int = 0) -> Drawn:
    return Drawn(document["index"], sample, "image.png", document)


def batches(documents, size: int):
    """Batches of four images per document, drawn lazily."""
    places = [(document, sample) for document in documents for sample in range(4)]
    for start in range(0, len(places), size):
        now = places[start : start + size]
        yield [(drawn_for(document, sample), numbered(document["index"])) for document, sample in now]


# The judge -----------------------------------------------------------------------------------------------------


def test_every_prompt_can_be_fulfilled_and_is_judged_in_order():
    oracle, documents = Oracle(), geneval.documents()
    judged = list(geneval.GenEvalJudge(oracle, oracle, 16).judge(batches(documents, 16)))
    assert [(item.index, item.sample) for item in judged] == [(d["index"], s) for d in documents for s in range(4)]
    assert all(item.correct for item in judged), [item.reason for item in judged if not item.correct][:3]


def test_crops_of_many_images_share_full_batches():
    oracle = Oracle()
    list(geneval.GenEvalJudge(oracle, oracle, 16).judge(batches(geneval.documents(), 16)))
    assert set(oracle.batches[:-1]) == {16} and set(oracle.crop_batches[:-1]) == {16}
    colored = sum("color" in clause for record in geneval_records() for clause in record["include"])
    assert sum(oracle.crop_batches) == 4 * colored  # each crop once


def test_images_do_not_stay_in_memory():
    """With a long run of prompts without colors, crops never fill a batch, but images must still be freed."""
    oracle, seen, most = Oracle(), [], 0

    def stream():
        nonlocal most
        documents = [document for document in geneval.documents() if document["tag"] != "color_attr"]
        for batch in batches([*documents[:5], *(d for d in documents if d["tag"] == "position")], 8):
            seen.extend(weakref.ref(image) for _, image in batch)
            most = max(most, sum(image() is not None for image in seen))
            yield batch

    assert sum(1 for _ in geneval.GenEvalJudge(oracle, oracle, 16).judge(stream())) > 300
    assert most <= 17  # loop variables may still refer to the previous batch


def test_batched_verdicts_equal_one_by_one(judge_folders):
    """The real judges with random weights, against the rules on single images and single crops."""
    detector, colors = (
        Mask2FormerDetector.open(judge_folders["detector"]),
        ColorClassifier.open(judge_folders["clip"]),
    )
    seen = [item.label for item in detector.detect_batch([judges.picture(0)])[0]]
    label = max(set(seen), key=seen.count)
    include = [{"class": label, "count": 1, "color": color} for color in COLORS]
    documents = [
        {"index": n, "record": json.dumps({"tag": "colors", "include": [include[n % 10]], "prompt": str(n)})}
        for n in range(24)
    ]
    images = [judges.picture(n) for n in range(24)]
    pairs = [(drawn_for(document), image) for document, image in zip(documents, images, strict=True)]
    found = list(geneval.GenEvalJudge(detector, colors, 8).judge(pairs[n : n + 8] for n in range(0, 24, 8)))
    for document, image, judgement in zip(documents, images, found, strict=True):
        (instances,) = detector.detect_batch([image])
        named = [replace(item, color=colors.classify([colors.prepare(image, item)])[0]) for item in instances]
        assert judgement.correct == evaluate(json.loads(document["record"]), named).correct
    assert 0 < sum(item.correct for item in found) < 24


def test_unknown_classes_and_colors_are_rejected():
    oracle = Oracle()
    for clause, message in (
        ({"class": "unicorn", "count": 1}, "does not know the class 'unicorn'"),
        ({"class": "cup", "count": 1, "color": "beige"}, "colors must be among red"),
    ):
        record = {"tag": "colors", "include": [clause], "prompt": "a photo"}
        pair = (drawn_for({"index": 0, "record": json.dumps(record)}), numbered(0))
        with pytest.raises(ValueError, match=message):
            list(geneval.GenEvalJudge(oracle, oracle, 4).judge(iter([[pair]])))


# The task ------------------------------------------------------------------------------------------------------


@pytest.fixture
def oracle_judges(monkeypatch):
    """The task with an oracle that fails every third prompt."""
    oracle = Oracle(spoil=lambda number: number % 3 == 0)
    judge_of = lambda options: geneval.GenEvalJudge(oracle, oracle, options.batch_size)  # noqa: E731
    benchmark = replace(geneval.BENCHMARK, find_judges=lambda options: {"detector": "oracle"}, open_judge=judge_of)
    monkeypatch.setattr(geneval.process_results.__self__, "benchmark", benchmark)
    return oracle


def official_number(prompt: str) -> int:
    return next(number for number, record in enumerate(geneval_records()) if record["prompt"] == prompt)


def read_lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_outcome(results: dict, folder, limit: int) -> None:
    documents = geneval.documents()[:limit]
    for tag in dict.fromkeys(document["tag"] for document in documents):
        expected = [document["index"] % 3 != 0 for document in documents if document["tag"] == tag]
        assert results[f"{tag},none"] == pytest.approx(np.mean(expected))
    assert results["overall,none"] == pytest.approx(np.mean([results[f"{tag},none"] for tag in geneval.SKILLS]))
    assert results["overall_low,none"] <= results["overall,none"] <= results["overall_high,none"]
    rows = read_lines(folder / "judgements.jsonl")
    assert [row["index"] for row in rows] == sorted(document["index"] for document in documents for _ in range(4))
    assert all(row["correct"] == (row["reason"] == "") == (row["index"] % 3 != 0) for row in rows)
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["judges"] == {"detector": "oracle"} and scores["images"] == 4 * limit
    assert scores["scores"]["overall"]["value"] == pytest.approx(results["overall,none"])
    assert {"loading", "models", "beside"} == scores["seconds"].keys()
    page = (folder / "contact_sheet.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 4 * limit and page.count('class="bad"') == sum(
        not row["correct"] for row in rows
    )
    with Image.open(folder / "contact_sheet.png") as picture:
        assert picture.width > 400 and picture.height > 400


def test_a_complete_run_can_be_judged_again(oracle_judges, make_lm, evaluate, tmp_path):
    lm = make_lm(drawer=lambda prompt, seed: numbered(official_number(prompt)), batch_size=16)
    results = evaluate(lm, ["geneval"], limit=24)
    (folder,) = (tmp_path / "results/drawn").iterdir()
    check_outcome(results["results"]["geneval"], folder, 24)
    assert results["configs"]["geneval"]["metadata"]["judges"]["batch_size"] == 16
    kept = open_drawn_run(folder)
    benchmark = geneval.process_results.__self__.benchmark
    again = judge_run(kept, benchmark, JudgeOptions(batch_size=5), tmp_path / "again")
    assert read_lines(tmp_path / "again/judgements.jsonl") == read_lines(folder / "judgements.jsonl")
    assert again.scores["overall"].value == results["results"]["geneval"]["overall,none"]


def test_a_model_with_the_simple_interface_can_be_judged(oracle_judges, evaluate, tmp_path, lmms_eval_tasks):
    """Any model works that answers with JSON with the paths of its images."""
    from lmms_eval.api.model import lmms

    class Other(lmms):
        is_simple = True
        batch_size = 1

        def generate_until(self, requests):
            answers = []
            for request in requests:
                context, gen_kwargs, _, doc_id, task, _ = request.args
                paths = [tmp_path / f"other_{doc_id}_{n}.png" for n in range(gen_kwargs["num_images"])]
                for path in paths:
                    numbered(official_number(context)).save(path)
                answers.append(json.dumps({"text": "", "images": [str(path) for path in paths]}))
            return answers

        def loglikelihood(self, requests):
            raise NotImplementedError

        generate_until_multi_round = loglikelihood

    results = evaluate(Other(), ["geneval"], limit=12)["results"]["geneval"]
    (folder,) = (tmp_path / "results/drawn").iterdir()
    check_outcome(results, folder, 12)


def test_missing_judges_are_reported_before_drawing(make_lm, evaluate, tmp_path, monkeypatch, judge_folders):
    lm = make_lm(batch_size=8)
    monkeypatch.setenv("EVOTOK_JUDGE_DETECTOR", str(judge_folders["detector"]))
    for clip, message in (
        (str(tmp_path / "nowhere"), "set EVOTOK_JUDGE_CLIP to a path"),
        ("owner/clip", "hf download owner/clip --local-dir DIR.*EVOTOK_JUDGE_CLIP=DIR.*--predict_only"),
        (str(judge_folders["detector"]), "must be a folder with open_clip_config.json"),
    ):
        monkeypatch.setenv("EVOTOK_JUDGE_CLIP", clip)
        with pytest.raises(ValueError, match=message):
            evaluate(lm, ["geneval"], limit=2)
    assert not lm._model.draw_kwargs and not (tmp_path / "results").exists()


def test_a_detector_with_other_classes_is_reported_before_drawing(
    make_lm, evaluate, tmp_path, monkeypatch, judge_folders
):
    lm, folder = make_lm(batch_size=8), tmp_path / "detector"
    shutil.copytree(judge_folders["detector"], folder)
    monkeypatch.setenv("EVOTOK_JUDGE_DETECTOR", str(folder))
    monkeypatch.setenv("EVOTOK_JUDGE_CLIP", str(judge_folders["clip"]))
    config = json.loads((folder / "config.json").read_text())
    labels = dict(config["id2label"])
    for changed, message in (
        ({**labels, "3": "unicorn"}, "class 3 is 'unicorn', expected COCO's 'motorcycle'"),
        ({key: value for key, value in labels.items() if int(key) < 79}, "has 79 classes, expected COCO's 80"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, "id2label": changed, "label2id": {}}))
        with pytest.raises(ValueError, match=f"{message}.*Nothing has been drawn"):
            evaluate(lm, ["geneval"], limit=2)
    assert not lm._model.draw_kwargs and not (tmp_path / "results").exists()


def test_the_number_of_images_is_checked_before_drawing(
    oracle_judges, make_lm, evaluate, lmms_eval_tasks, caplog, tmp_path
):
    lm = make_lm(drawer=lambda prompt, seed: numbered(official_number(prompt)), batch_size=8)
    with pytest.raises(ValueError, match="geneval: num_images must be a whole number of at least 1, got 0"):
        evaluate(lm, ["geneval"], limit=6, gen_kwargs="num_images=0")
    assert not lm._model.draw_kwargs
    results = evaluate(lm, ["geneval"], limit=6, gen_kwargs="num_images=2")
    assert "geneval: 2 images per prompt instead of 4; the score is not comparable" in caplog.text
    file = tmp_path / "20260101_000000_results.json"
    file.write_text(json.dumps({key: results[key] for key in ("results", "configs", "n-samples")}, default=str))
    (result,) = read_results_file(file)
    assert result.images_per_prompt == 2
    row = next(row for row in card_rows() if row.name == "GenEval")
    (filled,) = make_card([make_run("ours", [file])], [row], published(["Janus-Pro"])).rows
    assert "only 6 documents" in filled.ours["ours"].differs
    whole = replace(result, limited=False)
    run = replace(make_run("ours", [file]), tasks={"geneval": whole})
    (filled,) = make_card([run], [row], published(["Janus-Pro"])).rows
    assert filled.ours["ours"].differs == "GenEval: ours has 2 images per prompt, published ones 4"


def test_a_mistyped_option_is_rejected(make_lm, evaluate, monkeypatch):
    monkeypatch.setenv("EVOTOK_JUDGE_DETEKTOR", "x")
    with pytest.raises(ValueError, match="did you mean EVOTOK_JUDGE_DETECTOR"):
        evaluate(make_lm(), ["geneval"], limit=1)


def test_drawing_without_judging_and_judging_later(make_lm, lmms_eval_tasks, tmp_path):
    """--predict_only does not need judges, and lmms-eval's samples are sufficient to judge the images later."""
    from lmms_eval.evaluator import simple_evaluate

    from eval_tasks.judging.drawn_run import answers_of

    lm = make_lm(drawer=lambda prompt, seed: numbered(official_number(prompt)), batch_size=8)
    manager = lmms_eval_tasks.TaskManager(include_defaults=False, model_name="evotok")
    results = simple_evaluate(model=lm, tasks=["geneval"], limit=6, task_manager=manager, predict_only=True)
    samples = tmp_path / "x_samples_geneval.jsonl"
    rows = [
        {"target": str(sample["target"]), "filtered_resps": sample["filtered_resps"][0]}
        for sample in results["samples"]["geneval"]
    ]
    samples.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = store_drawn_run(tmp_path / "kept", "geneval", answers_of(samples))
    assert [item.document for item in run.drawn[::4]] == sorted(geneval.documents()[:6], key=lambda d: d["index"])
    samples.write_text('{"target": "a photo"}\n')
    with pytest.raises(ValueError, match="line 1, cannot be read as an answer of a drawing task"):
        list(answers_of(samples))


# Bad input -----------------------------------------------------------------------------------------------------


def answer(*paths) -> str:
    return json.dumps({"text": "", "images": [str(path) for path in paths]})


def test_faulty_answers_are_listed_and_all_others_are_stored(tmp_path):
    for n in range(3):
        numbered(n).save(tmp_path / f"{n}.png")
    documents = geneval.documents()[:3]
    answers = [answer(tmp_path / "0.png", tmp_path / "gone.png"), "sorry", answer(tmp_path / "2.png")]
    with pytest.raises(
        ValueError, match="2 of the model's answers cannot be judged.*gone.png.*other 2 images are stored"
    ):
        store_drawn_run(tmp_path / "kept", "geneval", zip(documents, answers, strict=True))
    assert len(list((tmp_path / "kept/images").iterdir())) == 2
    with pytest.raises(ValueError, match="is incomplete: 2 answers are missing"):
        open_drawn_run(tmp_path / "kept")


def test_broken_images_and_empty_or_damaged_folders(tmp_path, monkeypatch):
    judges.picture(0).save(tmp_path / "0.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "0.png").read_bytes()[:600])
    documents = geneval.documents()
    run = store_drawn_run(tmp_path / "a", "geneval", [(documents[0], answer(tmp_path / "0.png", tmp_path / "cut.png"))])
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as in parts of lmms-eval
    with pytest.raises(ValueError, match="_1.png cannot be read"):
        list(run.images(1))
    assert ImageFile.LOAD_TRUNCATED_IMAGES
    store_drawn_run(tmp_path / "b", "geneval", [])
    with pytest.raises(ValueError, match="the run was empty"):
        open_drawn_run(tmp_path / "b")
    (tmp_path / "a/drawn.jsonl").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        open_drawn_run(tmp_path / "a")
    with pytest.raises(ValueError, match="drawn.json cannot be read: No such file"):
        open_drawn_run(tmp_path)


def test_a_failed_judge_leaves_the_images_and_names_their_folder(
    make_lm, evaluate, tmp_path, monkeypatch, oracle_judges
):
    monkeypatch.setattr(oracle_judges, "detect_batch", lambda images: 1 / 0)
    lm = make_lm(drawer=lambda prompt, seed: numbered(official_number(prompt)), batch_size=8)
    with pytest.raises(ZeroDivisionError) as caught:
        evaluate(lm, ["geneval"], limit=2)
    (folder,) = (tmp_path / "results/drawn").iterdir()
    assert f"evotok-eval judge {folder}" in caught.value.__notes__[0]
    assert len(open_drawn_run(folder).drawn) == 8
