"""Upstream's drawing and editing tasks: the list, and each of them from its YAML up to its judge."""

import json
import re
import sys
import types
from pathlib import Path

import datasets
import pytest
import yaml
from PIL import Image

from eval_tasks import upstream_drawing
from eval_tasks.upstream_drawing import UPSTREAM, modality_of, options_of

QUESTION = "make it red"
SOURCE = Image.new("RGB", (32, 32), (10, 200, 30))

# A row with the columns that each task's functions read.
ROWS = {
    "WISE": {"Prompt": QUESTION, "Explanation": "red", "prompt_id": 1, "Category": "Culture"},
    "gedit_bench": {"input_image": SOURCE, "instruction": QUESTION, "instruction_language": "en", "key": "a",
                    "task_type": "color_alter", "Intersection_exist": True},
    "imgedit": {"image": SOURCE, "prompt": QUESTION, "key": "a", "edit_type": "adjust"},
    "kris_bench": {"ori_images": [SOURCE], "gt_image": SOURCE, "ins_en": QUESTION, "explain_en": "red",
                   "category": "color_change", "image_id": "1", "ori_img": ["a.png"], "gt_img": "b.png"},
    "structeditbench": {"source_image": SOURCE, "instruction": QUESTION, "category": "chart", "key": "a",
                        "qa_list": [{"question": "red?", "ground_truth_answer": "yes", "label": "editing"}]},
    "babyvision_gen": {"image": SOURCE, "answerImage": SOURCE, "generationPrompt": QUESTION, "taskId": "1", "type": "t",
                       "subtype": "s"},
    "uni_mmmu_jigsaw": {"ref_image": SOURCE, "cand0_image": SOURCE, "cand1_image": SOURCE, "label": 1},
    "ueval": {"prompt": QUESTION, "text_ref": "red", "id": "1", "task_type": "art", "rubrics": []},
}  # fmt: skip


def upstream_folder() -> Path:
    import lmms_eval.tasks

    return Path(lmms_eval.tasks.__file__).parent


def test_the_list_has_every_task_that_expects_the_paths_of_images(lmms_eval_tasks):
    """Upstream's tasks whose scoring reads `images` from the model's JSON; a new version of lmms-eval may add some."""
    reads_images = re.compile(r"pred\.get\([\"']images[\"']")
    folders = {file.parent for file in upstream_folder().rglob("*.py") if reads_images.search(file.read_text())}
    found = set()
    for folder in folders:
        for file in folder.glob("*.yaml"):
            text = re.sub(r"!function \S+", "x", file.read_text())
            content = yaml.safe_load(text) or {}
            if isinstance(content.get("task"), str) and content.get("output_type") == "generate_until":
                found.add(content["task"])
    assert found == set(UPSTREAM)


def test_options_for_text_do_not_reach_drawings():
    upstream = {"max_new_tokens": 64, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False}
    assert options_of("WISE", upstream, {}) == {"modality": "image"}
    given = {"temperature": 0.5}
    assert options_of("imgedit", {**upstream, **given}, given) == {"modality": "edit", "temperature": 0.5}
    assert options_of("mme", upstream, {}) == {**upstream, "modality": "text"}
    assert modality_of("ueval", {}) == "document" and modality_of("mine", {"modality": "image"}) == "image"


def test_the_key_of_the_judge_is_missed_before_drawing(caplog, monkeypatch):
    assert upstream_drawing.missing_judge("WISE", {}) == "WISE_API_KEY or OPENAI_API_KEY"
    assert upstream_drawing.missing_judge("WISE", {"OPENAI_API_KEY": "x"}) == ""
    assert upstream_drawing.missing_judge("mme", {}) == ""
    monkeypatch.delenv("IMGEDIT_API_KEY", raising=False)
    upstream_drawing.warn_of_judge("imgedit")
    assert "whose key IMGEDIT_API_KEY is not set" in caplog.text and "--predict_only" in caplog.text


@pytest.fixture
def local_data(tmp_path, monkeypatch):
    """A root of data sets with one row for each task, and no network."""
    root = tmp_path / "data"
    for task in ROWS:
        config = next(file for file in upstream_folder().rglob("*.yaml") if f"{task}\n" in _task_line(file))
        settings = yaml.safe_load(re.sub(r"!function \S+", "x", config.read_text()))
        path, split, name = settings["dataset_path"], settings["test_split"], settings.get("dataset_name", "default")
        if "/" not in path:
            continue
        row = {column: [value] for column, value in ROWS[task].items()}
        table = datasets.Dataset.from_dict(row)
        for column, value in ROWS[task].items():
            if isinstance(value, Image.Image):
                table = table.cast_column(column, datasets.Image())
            elif isinstance(value, list) and value and isinstance(value[0], Image.Image):
                table = table.cast_column(column, datasets.Sequence(datasets.Image()))
        (root / path / "data").mkdir(parents=True)
        table.to_parquet(root / path / "data" / f"{split}-00000-of-00001.parquet")
        files = [{"split": split, "path": f"data/{split}-*"}]
        card = yaml.safe_dump({"configs": [{"config_name": name, "data_files": files}]})
        (root / path / "README.md").write_text(f"---\n{card}---\n")
    monkeypatch.setenv("EVOTOK_DATA_ROOT", str(root))
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "cache"))
    return root


def _task_line(file: Path) -> str:
    found = re.search(r"^task: *[\"']?([\w-]+)", file.read_text(), re.M)
    return f"{found[1]}\n" if found else ""


@pytest.mark.parametrize("task", sorted(set(ROWS) - {"structeditbench"}))  # its data has no place on the hub
def test_a_task_runs_from_its_yaml_to_its_judge(task, lmms_eval_tasks, local_data, tiny_mllm, tmp_path, monkeypatch):
    """A small model draws; the judge is a function that records the answer in place of upstream's scoring."""
    from lmms_eval.evaluator import simple_evaluate

    from eval_tasks.model import EvoTokLmms
    from llava_ext.model_folder import OpenModel

    if task == "ueval":  # imports the package of its judge, which is not called here
        google = sys.modules.get("google") or types.ModuleType("google")
        monkeypatch.setattr(google, "genai", types.ModuleType("google.genai"), raising=False)
        monkeypatch.setitem(sys.modules, "google", google)
        monkeypatch.setitem(sys.modules, "google.genai", google.genai)
    lm = EvoTokLmms("x", load=lambda *_: OpenModel(*tiny_mllm, "", "f"), device="cpu", images_dir=str(tmp_path / "i"))
    manager = lmms_eval_tasks.TaskManager(model_name="evotok", include_path=str(upstream_folder() / folder_of(task)),
                                          include_defaults=False)  # fmt: skip
    loaded = manager.load_task_or_group([task], "chat")[task]
    judged = []

    def score(doc, results, **_):
        judged.append((doc, results[0]))
        return {metric["metric"]: 1.0 for metric in loaded.config.metric_list}

    loaded.config.process_results = score
    for metric in loaded._aggregation_list:
        loaded._aggregation_list[metric] = lambda items: float(len(items))
    simple_evaluate(model=lm, tasks=[loaded], task_manager=manager, bootstrap_iters=0, limit=1, cli_args=arguments())
    ((doc, answer),) = judged
    if task not in UPSTREAM:
        return  # answered with text, of which a random model's may be empty
    drawn = json.loads(answer)
    assert set(drawn) == {"text", "images"}
    if UPSTREAM[task].modality != "document":
        (path,) = drawn["images"]
        assert Image.open(path).size == (48, 48)
    if UPSTREAM[task].needs_media:
        assert any(isinstance(value, Image.Image | list) and value for value in doc.values())
        media = doc.get("input_image") or doc.get("image") or doc.get("ori_images")
        assert media, "scoring reads the source image without --process_with_media"


def test_a_task_without_the_key_of_its_judge_is_left_out_when_asked(lmms_eval_tasks, local_data, monkeypatch):
    from eval_tasks import unavailable

    monkeypatch.setattr(unavailable, "_LEFT_OUT", {})
    monkeypatch.delenv("IMGEDIT_API_KEY", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "x")  # for WISE
    folders = [str(upstream_folder() / folder_of(task)) for task in ("imgedit", "WISE")]
    manager = lmms_eval_tasks.TaskManager(model_name="evotok", include_path=folders, include_defaults=False)
    assert set(manager.load_task_or_group(["imgedit", "WISE"], "chat")) == {"imgedit", "WISE"}
    monkeypatch.setenv("EVOTOK_SKIP_UNAVAILABLE", "1")
    assert set(manager.load_task_or_group(["imgedit", "WISE"], "chat")) == {"WISE"}
    assert "IMGEDIT_API_KEY, is not set" in unavailable._LEFT_OUT["imgedit"]


def folder_of(task: str) -> str:
    return next(file for file in upstream_folder().rglob("*.yaml") if f"{task}\n" == _task_line(file)).parent.name


def arguments():
    import argparse

    return argparse.Namespace(output_path=None, process_with_media=False, reasoning_tags=None)


def test_an_edit_reads_its_image_and_is_reused(lmms_eval_tasks, instance, tiny_mllm, tmp_path):
    from eval_tasks.model import EvoTokLmms
    from llava_ext.model_folder import OpenModel

    lm = EvoTokLmms("x", load=lambda *_: OpenModel(*tiny_mllm, "", "f"), device="cpu", images_dir=str(tmp_path))
    red, blue = (Image.new("RGB", (48, 48), color) for color in ("red", "blue"))

    def edited(doc_id, image):
        request = instance(lm, "edits", doc_id, QUESTION, {"modality": "edit"}, media=[("image", image)])
        (answer,) = lm.generate_until([request])
        (path,) = json.loads(answer)["images"]
        return Path(path)

    first = edited(0, red)
    assert first == tmp_path / "edits/00000_0.png" and Image.open(first).text["prompt"] == QUESTION
    before = first.stat().st_mtime_ns
    assert edited(0, red).stat().st_mtime_ns == before  # reused
    assert edited(0, blue).stat().st_mtime_ns != before  # another source image
