"""`evotok-eval judge`."""

import json
import shutil
from functools import partial

import pytest
from other_process import in_other_process
from PIL import Image

from eval_tasks.cli import main
from eval_tasks.judging.drawn_run import store_drawn_run
from eval_tasks.judging.scene_detector import SceneDetector
from eval_tasks.tasks.geneval_scenes import task as geneval_scenes
from evotok_plugin.common.locks import LOCK, locked
from evotok_plugin.scenes.scene import SKILLS, render, sample_scene


@pytest.fixture
def drawn_scenes(tmp_path, rng):
    """Documents and answers: images for two prompts of each skill, every second one correct."""
    from evotok_plugin.scenes.captions import prompt_record

    answers = []
    for index in range(12):
        skill = SKILLS[index % len(SKILLS)]
        scene, other = sample_scene(rng, skill), sample_scene(rng, "single_object")
        record = prompt_record(scene, skill)
        document = {"index": index, "tag": record["tag"], "prompt": record["prompt"], "record": json.dumps(record)}
        path = tmp_path / f"{index}.png"
        render(scene if index % 2 == 0 else other).save(path)
        answers.append((document, json.dumps({"text": "", "images": [str(path)]})))
    return answers


def test_stored_images_are_judged(drawn_scenes, tmp_path, capsys):
    run = store_drawn_run(tmp_path / "out/drawn/a", "geneval_scenes", drawn_scenes)
    assert main(["judge", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "| **overall** |" in printed and "contact_sheet.html" in printed
    rows = [json.loads(line) for line in (run.folder / "judgements.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == list(range(12))
    assert all(row["correct"] for row in rows if row["index"] % 2 == 0)
    for row, (document, answer) in zip(rows, drawn_scenes, strict=True):
        (path,) = geneval_scenes.parse_images(answer)
        record = json.loads(document["record"])
        assert row["correct"] == geneval_scenes.judge_image(path, record, record)["correct"]


def test_samples_of_a_run_are_stored_and_judged(drawn_scenes, tmp_path, capsys):
    folder = tmp_path / "out/model"
    folder.mkdir(parents=True)
    samples = folder / "20260101_000000_samples_geneval_scenes.jsonl"
    rows = [{"target": json.dumps(document), "filtered_resps": answer} for document, answer in drawn_scenes]
    samples.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["judge", str(tmp_path / "out"), "-o", str(tmp_path / "report")]) == 2
    assert "is outside of" in capsys.readouterr().err and not list((tmp_path / "out").rglob("drawn/*/images/*"))
    shutil.rmtree(folder / "drawn")
    images = ["--images", str(tmp_path)]
    assert main(["judge", str(tmp_path / "out"), "-o", str(tmp_path / "report"), *images]) == 0
    assert (tmp_path / "report/scores.json").is_file()
    first = (tmp_path / "report/judgements.jsonl").read_text()
    assert main(["judge", str(samples), "-o", str(tmp_path / "again"), "--batch_size", "5", *images]) == 0
    assert (tmp_path / "again/judgements.jsonl").read_text() == first


def test_an_interrupted_judging_leaves_the_judgements_made_so_far(drawn_scenes, tmp_path, monkeypatch):
    run = store_drawn_run(tmp_path / "out/a", "geneval_scenes", drawn_scenes)
    unfinished, detect = run.folder / "judgements.jsonl.part", SceneDetector.detect_batch
    readable = []

    def detect_two_batches(self, images):
        readable.append(len(unfinished.read_text().splitlines()))
        if len(readable) > 2:
            raise KeyboardInterrupt
        return detect(self, images)

    monkeypatch.setattr(SceneDetector, "detect_batch", detect_two_batches)
    assert main(["judge", str(run.folder), "--batch_size", "4"]) == 130
    assert readable == [0, 4, 8] and len(unfinished.read_text().splitlines()) == 8
    assert not (run.folder / "judgements.jsonl").exists()
    monkeypatch.setattr(SceneDetector, "detect_batch", detect)
    assert main(["judge", str(run.folder)]) == 0
    assert len((run.folder / "judgements.jsonl").read_text().splitlines()) == 12 and not unfinished.exists()


def test_a_folder_is_judged_by_one_process_at_a_time(drawn_scenes, tmp_path, capfd):
    run = store_drawn_run(tmp_path / "out/drawn/a", "geneval_scenes", drawn_scenes)
    judge_again = partial(main, ["judge", str(tmp_path / "out")])
    with locked(run.folder / LOCK, run.folder):
        assert in_other_process(judge_again) == ""
        assert f"another run is writing to {run.folder}" in capfd.readouterr().err
        assert not (run.folder / "judgements.jsonl").exists()
    assert judge_again() == 0 and not (run.folder / LOCK).exists()


def test_bad_input_is_a_user_error(drawn_scenes, tmp_path, capsys):
    def error(*arguments) -> str:
        assert main(["judge", *map(str, arguments)]) == 2
        return capsys.readouterr().err

    assert "neither drawn images nor lmms-eval samples" in error(tmp_path)
    assert "is not a folder" in error(tmp_path / "nowhere")
    store_drawn_run(tmp_path / "out/a", "geneval_scenes", drawn_scenes)
    store_drawn_run(tmp_path / "out/b", "geneval", drawn_scenes)
    assert "holds images of geneval, geneval_scenes: choose one with --task" in error(tmp_path / "out")
    assert "download it on a machine with network access" in error(tmp_path / "out", "--task", "geneval")
    assert "the hub does not provide it" in error(tmp_path / "out", "--task", "geneval", "--detector", "my models/x")
    assert "batch size must be at least 1, got 0" in error(tmp_path / "out", "--batch_size", "0")
    samples = tmp_path / "x_samples_mmbench_scenes.jsonl"
    samples.write_text("")
    assert "belongs to the task 'mmbench_scenes'; expected one of dpg_bench" in error(samples)


@pytest.mark.parametrize(
    ("lines", "about", "message"),
    [
        ({"image": None}, {}, "drawn.jsonl cannot be read"),
        ({"index": "x"}, {}, "drawn.jsonl cannot be read"),
        ({"document": {}}, {}, "has no valid GenEval record"),
        ({"document": {"record": "[1]"}}, {}, "has no valid GenEval record"),
        ({}, {"faults": 1}, "drawn.json cannot be read"),
    ],
)
def test_a_damaged_run_is_a_user_error(tmp_path, capsys, lines, about, message):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (48, 48)).save(tmp_path / "images" / "a.png")
    row = {"index": 0, "sample": 0, "image": "images/a.png", "document": {}} | lines
    (tmp_path / "drawn.jsonl").write_text(json.dumps(row))
    (tmp_path / "drawn.json").write_text(json.dumps({"task": "geneval_scenes", "faults": []} | about))
    assert main(["judge", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_deeply_nested_json_is_a_user_error(tmp_path, capsys):
    (tmp_path / "drawn.json").write_text("[" * 100_000)
    assert main(["judge", str(tmp_path)]) == 2
    assert "drawn.json cannot be read" in capsys.readouterr().err
    (tmp_path / "results.json").write_text("[" * 100_000)
    assert main(["report", str(tmp_path / "results.json")]) == 2
    assert "cannot be read" in capsys.readouterr().err
