"""GenAI-Bench and DPG-Bench: prompts files, judges and complete runs."""

import csv
import json
from dataclasses import replace

import judges
import numpy as np
import pytest
from PIL import Image

from eval_tasks.judging.drawn_run import Drawn, drawn_run_folders, store_drawn_run
from eval_tasks.judging.vqa import Answer
from eval_tasks.tasks.dpg_bench import task as dpg_bench
from eval_tasks.tasks.genai_bench import task as genai_bench
from eval_tasks.tasks.prompt_files import read_rows

SKILLS = {"basic": [0, 2], "advanced": [1], "attribute": [0, 1, 2], "counting": [1], "scene": [2]}
PROMPTS = {f"{n:05d}": {"id": f"{n:05d}", "prompt": f"a {word} cup", "models": {}} for n, word in enumerate("abc")}
DPG_COLUMNS = (
    "item_id", "text", "keywords", "proposition_id", "dependency", "category_broad", "category_detailed", "tuple",
    "question_natural_language",
)  # fmt: skip
DPG_ROWS = [
    ("0", "a cup, blue", "", 1, "0", "entity", "whole", "entity - whole (cup)", "Is there a cup?"),
    ("0", "a cup, blue", "", 2, "1", "attribute", "color", "attribute - color (cup, blue)", "Is the cup blue?"),
    (
        "0",
        "a cup, blue",
        "",
        3,
        "2",
        "relation",
        "spatial",
        "relation - non-spatial (cup, here)",
        "Is the blue cup here?",
    ),
    ("x7", 'a "dog"', "", 1, "0", "global", "", "global - (photo)", "Is it a photo?"),
    ("x7", 'a "dog"', "", 2, "0", "entity", "whole", "entity - whole (dog)", "Is there a dog?"),
    ("x7", 'a "dog"', "", 3, "1, 2", "other", "text", "other - text (dog)", "Is there text on the dog?"),
]


@pytest.fixture
def genai_folder(tmp_path):
    folder = tmp_path / "genai"
    folder.mkdir()
    (folder / "genai_image.json").write_text(json.dumps(PROMPTS))
    (folder / "genai_skills.json").write_text(json.dumps(SKILLS))
    return folder


@pytest.fixture
def dpg_file(tmp_path):
    path = tmp_path / "dpg_bench.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([DPG_COLUMNS, *DPG_ROWS])
    return path


class FakeVqa:
    """Answers questions with a given function, and records its batches."""

    def __init__(self, yes) -> None:
        self.yes, self.batches = yes, []

    def ask(self, images, questions):
        self.batches.append(list(questions))
        return [Answer(self.yes(question), 0.5) for question in questions]


def judged(judge, documents, batch_size=2):
    pairs = [(Drawn(d["index"], 0, "x.png", d), judges.picture(d["index"])) for d in documents]
    return list(judge.judge(pairs[start : start + batch_size] for start in range(0, len(pairs), batch_size)))


# Prompts -------------------------------------------------------------------------------------------------------


def test_genai_prompts_are_the_same_in_all_formats(genai_folder, tmp_path):
    documents = genai_bench.read_prompts(genai_folder)
    assert documents[1] == {"index": 1, "prompt": "a b cup", "skills": ["advanced", "attribute", "counting"]}
    tags = [
        {"basic_skills": ["Attribute"], "advanced_skills": []},
        {"basic_skills": ["attribute"], "advanced_skills": ["counting"]},
        {"basic_skills": ["attribute", "scene"], "advanced_skills": ["None"]},
    ]
    tags[2]["advanced_skills"] = []
    rows = [{"Index": n, "Prompt": f"a {word} cup", "Tags": tags[n]} for n, word in enumerate("abc")]
    nested = tmp_path / "nested.jsonl"
    nested.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flat = tmp_path / "flat.csv"
    with flat.open("w", newline="") as file:
        table = [[row["Prompt"], *("|".join(row["Tags"][name]) for name in tags[0])] for row in rows]
        csv.writer(file).writerows([["prompt", *tags[0]], *table])
    texts = tmp_path / "texts.csv"
    with texts.open("w", newline="") as file:
        csv.writer(file).writerows([["Prompt", "Tags"], *([row["Prompt"], str(row["Tags"])] for row in rows)])
    for path in (nested, flat, texts):
        assert genai_bench.read_prompts(path) == documents


def test_genai_prompts_in_another_format_are_rejected(genai_folder, tmp_path):
    (genai_folder / "genai_skills.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="lists of prompt numbers by skill"):
        genai_bench.read_prompts(genai_folder)
    (genai_folder / "genai_skills.json").unlink()
    with pytest.raises(ValueError, match="is missing genai_skills.json"):
        genai_bench.read_prompts(genai_folder)
    for name, text, message in (
        ("a.jsonl", '{"caption": "x", "skills": ["counting"]}', "needs a column 'prompt' or 'text'"),
        ("b.jsonl", '{"prompt": "x"}', "a row has no skills"),
        ("c.jsonl", '{"prompt": "x", "skills": ["juggling"]}', "skills \\['juggling'\\], known are basic"),
        ("d.txt", "a cup", "prompts are read from .csv"),
        ("e.json", "{", "cannot be read"),
        ("f.csv", "", "must hold rows"),
        ("g.json", "[1]", "must hold rows"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            genai_bench.read_prompts(tmp_path / name)
    with pytest.raises(ValueError, match="set EVOTOK_GENAI_BENCH_PROMPTS"):
        genai_bench.read_prompts(tmp_path / "nowhere")


def test_dpg_prompts(dpg_file, tmp_path):
    documents = dpg_bench.read_prompts(dpg_file)
    assert [document["prompt"] for document in documents] == ["a cup, blue", 'a "dog"']
    questions = json.loads(documents[1]["questions"])
    assert [question["parents"] for question in questions] == [[], [], [1, 2]]
    assert [question["kind"] for question in questions] == ["global", "entity - whole", "other - text"]
    assert dpg_bench.read_prompts(tmp_path) == documents  # a folder with one table
    import pyarrow.parquet

    columns = {name: [str(row[place]) for row in DPG_ROWS] for place, name in enumerate(DPG_COLUMNS)}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "other.parquet")
    assert dpg_bench.read_prompts(tmp_path / "other.parquet") == documents
    with pytest.raises(ValueError, match="must hold one .csv or .parquet, found 2"):
        dpg_bench.read_prompts(tmp_path)


def test_dpg_prompts_in_another_format_are_rejected(tmp_path):
    for place, value, message in (
        (4, "9", "depends on missing ones of \\[9\\]"),
        (3, "first", "expected a number as proposition_id, got 'first'"),
        (4, "1;2", "expected a number as dependency, got '1;2'"),
        (7, "color (cup)", "expected one of global, entity, attribute, relation, other as category, got 'color'"),
    ):
        row = list(DPG_ROWS[0])
        row[place] = value
        with (tmp_path / "x.csv").open("w", newline="") as file:
            csv.writer(file).writerows([DPG_COLUMNS, row])
        with pytest.raises(ValueError, match=message):
            dpg_bench.read_prompts(tmp_path / "x.csv")
    (tmp_path / "x.csv").write_text("prompt\na cup\n")
    with pytest.raises(ValueError, match="needs a column 'item_id', got \\['prompt'\\]"):
        dpg_bench.read_prompts(tmp_path / "x.csv")
    with pytest.raises(ValueError, match="download https://github.com/TencentQQGYLab/ELLA"):
        dpg_bench.read_prompts("dpg_bench.csv")


def test_rows_of_a_json_object_keep_their_keys(tmp_path):
    (tmp_path / "a.json").write_text('{"7": {"prompt": "x"}, "8": {"id": "own", "prompt": "y"}}')
    assert [row["id"] for row in read_rows(tmp_path / "a.json")] == ["7", "own"]


# Judges --------------------------------------------------------------------------------------------------------


def test_vqascore_asks_the_papers_question_and_counts_for_every_skill(genai_folder):
    vqa = FakeVqa(lambda question: 0.9 if "a b cup" in question else 0.2)
    found = judged(genai_bench.VqaScoreJudge(vqa), genai_bench.read_prompts(genai_folder))
    assert vqa.batches[0][0] == 'Does this figure show "a a cup"? Please answer yes or no.'
    assert [item.score for item in found] == [0.2, 0.9, 0.2] and found[0].correct is None
    assert found[1].marks == {"advanced": [0.9], "attribute": [0.9], "counting": [0.9]}


def test_dpg_questions_depend_on_their_parents(dpg_file):
    documents = dpg_bench.read_prompts(dpg_file)
    vqa = FakeVqa(lambda question: float("blue?" not in question))  # no only to the second question
    first, second = judged(dpg_bench.DpgJudge(vqa, 4), documents)
    assert list(map(len, vqa.batches)) == [4, 2]  # questions of two images share a batch
    assert first.score == pytest.approx(1 / 3) and second.score == 1.0
    # The third question is answered with yes, which counts for its category.
    assert first.marks["relation"] == [1.0] and first.marks["attribute"] == first.marks["attribute - color"] == [0.0]
    assert first.reason == "Is the cup blue?; Is the blue cup here?"


def naive_dpg(questions, said) -> float:
    """ELLA's scoring: scores by question number, set to 0 in order where the score of a parent is 0."""
    scores = {question["id"]: float(yes) for question, yes in zip(questions, said, strict=True)}
    for question in questions:
        for parent in question["parents"]:
            if scores[parent] == 0:
                scores[question["id"]] = 0.0
    return sum(scores.values()) / len(scores)


def test_dependent_answers_on_random_graphs():
    rng = np.random.default_rng(0)
    for _ in range(2000):
        size = int(rng.integers(1, 9))
        # Parents may come later in the file.
        questions = [
            {"id": n, "parents": [int(p) for p in rng.integers(1, size + 1, int(rng.integers(0, 3)))]}
            for n in range(1, size + 1)
        ]
        said = (rng.random(size) < 0.7).tolist()
        held = dpg_bench.dependent_answers(questions, said)
        assert sum(held) / size == pytest.approx(naive_dpg(questions, said))


# Whole runs ----------------------------------------------------------------------------------------------------


def colored(prompt: str, seed: int):
    return judges.picture(seed % 1000)


@pytest.mark.parametrize("task", ["genai_bench", "dpg_bench"])
def test_a_run_with_a_real_judge(task, make_lm, evaluate, monkeypatch, judge_folders, genai_folder, dpg_file, tmp_path):
    monkeypatch.setenv("EVOTOK_GENAI_BENCH_PROMPTS", str(genai_folder))
    monkeypatch.setenv("EVOTOK_DPG_BENCH_PROMPTS", str(dpg_file))
    monkeypatch.setenv("EVOTOK_JUDGE_VQA", str(judge_folders["vqa"]))
    monkeypatch.setenv("EVOTOK_JUDGE_BATCH_SIZE", "8")
    module = {"genai_bench": genai_bench, "dpg_bench": dpg_bench}[task]
    monkeypatch.setattr(module.process_results.__self__, "_documents", None)
    results = evaluate(make_lm(drawer=colored, batch_size=4), [task])["results"][task]
    (folder,) = (tmp_path / "results/drawn").iterdir()
    rows = [json.loads(line) for line in (folder / "judgements.jsonl").read_text().splitlines()]
    assert len(rows) == {"genai_bench": 3, "dpg_bench": 8}[task]
    assert results["overall,none"] == pytest.approx(np.mean([row["score"] for row in rows]))
    for skill in {"genai_bench": ("attribute", "advanced"), "dpg_bench": ("entity", "other")}[task]:
        expected = np.mean([mark for row in rows for mark in row["marks"].get(skill, [])])
        assert results[f"{skill},none"] == pytest.approx(expected)
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["judges"] == {"vqa": str(judge_folders["vqa"])} and scores["batch_size"] == 8
    assert (folder / "contact_sheet.html").read_text().count("data:image/jpeg") == len(rows)


def test_missing_prompts_are_reported_at_once(make_lm, evaluate, monkeypatch, tmp_path):
    monkeypatch.setenv("EVOTOK_DPG_BENCH_PROMPTS", str(tmp_path / "nowhere.csv"))
    monkeypatch.setattr(dpg_bench.process_results.__self__, "_documents", None)
    with pytest.raises(ValueError, match="nowhere.csv' does not exist; download https"):
        evaluate(make_lm(), ["dpg_bench"])


def test_a_missing_vqa_judge_is_reported_before_drawing(make_lm, evaluate, monkeypatch, genai_folder):
    monkeypatch.setenv("EVOTOK_GENAI_BENCH_PROMPTS", str(genai_folder))
    monkeypatch.setattr(genai_bench.process_results.__self__, "_documents", None)
    lm = make_lm()
    with pytest.raises(ValueError, match="hf download Qwen/Qwen2.5-VL-7B-Instruct --local-dir DIR.*--predict_only"):
        evaluate(lm, ["genai_bench"])
    assert not lm._model.draw_kwargs
    assert replace(genai_bench.BENCHMARK).overall == "images"


def test_lines_are_split_only_at_newlines(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "one\u2028two\x85three"}, ensure_ascii=False) + "\n\n", encoding="utf-8")
    assert read_rows(path) == [{"prompt": "one\u2028two\x85three"}]


def test_skills_may_be_python_literals(tmp_path):
    for text in ('{"basic_skills": ["scene"], "advanced_skills": null}', "{'basic_skills': ['scene'], 'x': None}"):
        assert genai_bench._tags({"Prompt": "a", "Tags": text}, tmp_path) == ["scene"]
    with pytest.raises(ValueError, match="neither JSON nor a Python literal"):
        genai_bench._tags({"Tags": "{broken"}, tmp_path)


def test_duplicate_documents_and_damaged_folders_are_rejected(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    answer = json.dumps({"text": "", "images": [str(tmp_path / "a.png")]})
    with pytest.raises(ValueError, match="document 3: its index occurs twice"):
        store_drawn_run(tmp_path / "kept", "geneval", [({"index": 3}, answer), ({"index": 3}, answer)])
    (tmp_path / "kept" / "drawn.json").write_text("{")
    with pytest.raises(ValueError, match="drawn.json cannot be read"):
        drawn_run_folders(tmp_path, "geneval")
