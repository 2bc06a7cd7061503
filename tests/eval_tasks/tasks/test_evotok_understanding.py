"""`evotok_understanding`: upstream's code of every task on synthetic rows in local folders."""

from pathlib import Path

import datasets
import pytest
import yaml
from PIL import Image

from eval_tasks.tasks.evotok_understanding.task import suite

FOLDERS = ("pope", "mmbench", "mme", "seedbench", "gqa", "textvqa", "vqav2", "ai2d", "mmmu")
HUB = "lmms-lab-encoder"


def picture(number: int) -> Image.Image:
    return Image.new("RGB", (48, 48), (number, 0, 0))


def write(root, name, split, rows, config=None, images=("image",)):
    """Write a data set like `hf download`: parquet, and a README with the configuration if there is one."""
    folder = root / HUB / name
    folder.mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_list(rows)
    for column in images:
        kind = [datasets.Image()] if isinstance(rows[0][column], list) else datasets.Image()
        table = table.cast_column(column, kind)
    file = f"{config or 'data'}/{split}-00000-of-00001.parquet"
    (folder / file).parent.mkdir(exist_ok=True)
    table.to_parquet(folder / file)
    if config:
        readme = folder / "README.md"
        head = readme.read_text().removesuffix("---\n") if readme.exists() else "---\nconfigs:\n"
        entry = f"- config_name: {config}\n  data_files:\n  - split: {split}\n    path: {config}/{split}-*\n"
        readme.write_text(f"{head}{entry}---\n")


def options_row(number, answer="B"):
    return {"question": f"mmbench {number}", "hint": "nan", "A": "a cat", "B": "a dog", "C": "nan", "D": "nan"} | {
        "answer": answer, "category": "animals", "L2-category": "all", "index": number, "source": "x", "split": "dev",
    }  # fmt: skip


@pytest.fixture
def data_root(tmp_path, monkeypatch):
    """Two questions for every task, with different right answers."""
    root = tmp_path / "data"
    shown = [{"image": picture(number)} for number in (0, 1)]
    write(root, "POPE", "test", [
        shown[n] | {"question_id": str(n), "question": f"pope {n}", "answer": ("yes", "no")[n], "category": "random"}
        for n in (0, 1)
    ])  # fmt: skip
    rows = [shown[n] | options_row(n, "BA"[n]) for n in (0, 1)]
    write(root, "MMBench", "dev", rows, config="en")
    write(root, "MME", "test", [
        shown[n] | {"question_id": "x", "question": f"mme {n} Please answer yes or no.", "answer": ("Yes", "No")[n]}
        | {"category": "color"}
        for n in (0, 1)
    ])  # fmt: skip
    write(root, "SEED-Bench", "test", [
        {"image": [picture(n)], "question": f"seed {n}", "answer": "CD"[n], "data_type": "image", "question_id": str(n)}
        | {f"choice_{letter}": f"choice {letter}" for letter in "abcd"}
        for n in (0, 1)
    ])  # fmt: skip
    gqa = [{"id": str(n), "imageId": f"i{1 - n}", "question": f"gqa {n}", "answer": ("red", "left")[n]} for n in (0, 1)]
    write(root, "GQA", "testdev", gqa, config="testdev_balanced_instructions", images=())
    write(root, "GQA", "testdev", [shown[n] | {"id": f"i{n}"} for n in (0, 1)], config="testdev_balanced_images")
    write(root, "textvqa", "validation", [
        shown[n] | {"question_id": n, "question": f"textvqa {n}", "answers": [("exit", "stop")[n]] * 10} for n in (0, 1)
    ])  # fmt: skip
    write(root, "VQAv2", "validation", [
        shown[n] | {"question_id": n, "question": f"vqav2 {n}"}
        | {"answers": [{"answer": ("2", "cat")[n], "answer_id": i} for i in range(10)]}
        for n in (0, 1)
    ])  # fmt: skip
    write(root, "ai2d", "test", [
        shown[n] | {"question": f"ai2d {n}", "options": ["sun", "moon", "star"], "answer": "21"[n]} for n in (0, 1)
    ])  # fmt: skip
    write(root, "MMMU", "validation", [
        {"image_1": picture(n), "id": f"validation_Art_{n}", "question": f"mmmu {n} <image 1>", "options": "['x', 'y']"}
        | {"answer": "BA"[n], "question_type": "multiple-choice"}
        for n in (0, 1)
    ], images=("image_1",))  # fmt: skip
    monkeypatch.setenv("EVOTOK_DATA_ROOT", str(root))
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.chdir(tmp_path)
    return root


# Right answers in the style of models.
WRITTEN = {
    "pope": ("Yes", "no"),
    "mmbench": ("B.", "It is a cat"),
    "mme": ("yes, it is", "No."),
    "seed": ("C", "D. choice d"),
    "gqa": ("Red", "left."),
    "textvqa": ("Exit", "the stop"),
    "vqav2": ("two", "a cat"),
    "ai2d": ("C. star", "B"),
    "mmmu": ("(B)", "A"),
}
FIGURES = {
    "pope": ("pope_accuracy,none", 1.0),
    "mmbench_en_dev_static": ("gpt_eval_score,none", 100.0),
    "mme": ("mme_perception_score,none", 200.0),
    "seedbench": ("seed_image,none", 1.0),
    "gqa": ("exact_match,none", 1.0),
    "textvqa_val": ("exact_match,none", 1.0),
    "vqav2_val": ("exact_match,none", 1.0),
    "ai2d": ("exact_match,flexible-extract", 1.0),
    "mmmu_val": ("mmmu_acc,none", 1.0),
}


def subject(text: str) -> tuple[str, int]:
    name, number = text.lower().split()[:2]
    return name, int(number)


@pytest.fixture
def upstream(lmms_eval_tasks):
    return [str(Path(lmms_eval_tasks.__file__).parent / name) for name in FOLDERS]


def test_right_and_wrong_answers_in_every_task(data_root, upstream, make_lm, evaluate, tmp_path):
    seen = {}

    def right(text, images):
        name, number = subject(text)
        seen[name, number] = (text, [image.getpixel((0, 0))[0] for image in images])
        return WRITTEN[name][number]

    def swapped(text, images):
        name, number = subject(text)
        return WRITTEN[name][1 - number]

    results = evaluate(make_lm(right), ["evotok_understanding"], include_path=upstream)["results"]
    assert {task: results[task][key] for task, (key, _) in FIGURES.items()} == {
        task: pytest.approx(value) for task, (_, value) in FIGURES.items()
    }
    assert len(seen) == 2 * len(FIGURES)
    for (name, number), (text, shades) in seen.items():
        assert shades == [1 - number if name == "gqa" else number], name
        assert "Answer" in text, name  # every prompt describes the form of the answer
    results = evaluate(make_lm(swapped), ["evotok_understanding"], include_path=upstream)["results"]
    assert {task: results[task][key] for task, (key, _) in FIGURES.items()} == dict.fromkeys(FIGURES, 0.0)


def test_missing_local_data_is_not_downloaded(data_root, upstream, make_lm, evaluate):
    (data_root / HUB / "POPE").rename(data_root / "elsewhere")
    with pytest.raises(ValueError, match="hf download --repo-type dataset lmms-lab-encoder/POPE"):
        evaluate(make_lm(), ["evotok_understanding"], include_path=upstream)


def test_changed_data_is_read_again(data_root, upstream, make_lm, evaluate):
    (file,) = (data_root / HUB / "MMBench/en").iterdir()
    for answer, score in (("B", 100.0), ("A", 0.0)):
        rows = [{"image": picture(0)} | options_row(0, answer)]
        datasets.Dataset.from_list(rows).cast_column("image", datasets.Image()).to_parquet(file)
        results = evaluate(make_lm(lambda text, images: "B"), ["mmbench_en_dev_static"], include_path=upstream)
        assert results["results"]["mmbench_en_dev_static"]["gpt_eval_score,none"] == score


def test_gqa_with_a_missing_image_is_an_error(data_root, upstream, make_lm, evaluate, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # lmms-eval tries five times
    folder = data_root / HUB / "GQA/testdev_balanced_images"
    (file,) = folder.iterdir()
    datasets.Dataset.from_parquet(str(file)).select([0]).to_parquet(file)
    with pytest.raises(ValueError, match="GQA: 1 questions without an image, first 'i1'"):
        evaluate(make_lm(), ["evotok_understanding"], include_path=upstream)


@pytest.mark.parametrize(
    ("environment", "runs"),
    [
        ({}, False),
        ({"OPENAI_API_KEY": "x"}, True),
        ({"API_TYPE": "azure", "OPENAI_API_KEY": "x"}, False),
        ({"API_TYPE": "azure", "AZURE_API_KEY": "x"}, True),
        ({"API_TYPE": "local"}, True),
    ],
)
def test_mmvet_runs_only_with_a_judge(environment, runs, caplog):
    assert ("evotok_mmvet" in suite(environment)) is runs
    assert runs is not ("mmvet is left out" in caplog.text)


def test_the_index_has_every_task(lmms_eval_tasks):
    index = lmms_eval_tasks.TaskManager(include_defaults=True).task_index
    assert {*FIGURES, "mmvet", "evotok_understanding", "evotok_reconstruction"} <= set(index)
    group = yaml.load(Path(index["evotok_understanding"]["yaml_path"]).read_text(), _WithoutFunctions)["task"]
    assert [*group[:-1], "evotok_mmvet"] == suite({"OPENAI_API_KEY": "x"}) and set(suite({"API_TYPE": "local"})) <= set(
        index
    )


class _WithoutFunctions(yaml.SafeLoader):
    pass


_WithoutFunctions.add_constructor("!function", lambda loader, node: node.value)
