"""The report card: from results files to a table, JSON and a plot, with incomparable figures marked."""

import json

import pytest
from PIL import Image

from eval_tasks.cli import main
from eval_tasks.reporting.card import make_card
from eval_tasks.reporting.plot import plot_card
from eval_tasks.reporting.published import card_rows, published
from eval_tasks.reporting.runs import read_run


def write(folder, results, model="models/a", time="20260101_000000", asked=100, groups=None):
    """Write a results file like lmms-eval 0.7.3, with 100 documents per task."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "results": {task: {"alias": task, **values} for task, values in results.items()},
        "group_subtasks": {task: [] for task in results} | (groups or {}),
        "n-samples": {task: {"original": 100, "effective": asked} for task in results},
        "config": {"model_args": f"pretrained={model}"},
        "model_name": model,
    }
    path = folder / f"{time}_results.json"
    path.write_text(json.dumps(content))
    return path


def card_of(*folders):
    return make_card([read_run(folder) for folder in folders], card_rows(), published())


def reconstruction(images=50000, size=256, **figures):
    return {"evotok_reconstruction": {"num_images,none": images, "image_size,none": size, "psnr,none": 24.0, **figures}}


def row_of(card, name):
    (row,) = [row for row in card.rows if row.benchmark.name == name]
    return row


def test_a_run_has_the_newest_result_of_each_task_below_its_folder(tmp_path):
    write(tmp_path / "gqa/a", {"gqa": {"exact_match,none": 0.5}})
    write(
        tmp_path / "gqa/a", {"gqa": {"exact_match,none": 0.6, "exact_match_stderr,none": 0.1}}, time="20260102_000000"
    )
    group = {"evotok_understanding": {" ": " "}, "ai2d": {"exact_match,flexible-extract": 0.7, "submission,none": None}}
    write(tmp_path / "suite", group, groups={"evotok_understanding": ["ai2d"]})
    (tmp_path / "suite/mmbench_en_dev_static_results.json").write_text("{}")  # upstream's submission, not results
    run = read_run(tmp_path)
    assert {task: result.figures for task, result in run.tasks.items()} == {
        "gqa": {"exact_match": 0.6},
        "ai2d": {"exact_match,flexible-extract": 0.7},
    }


def test_figures_are_converted_to_the_published_unit(tmp_path):
    write(tmp_path, {"gqa": {"exact_match,none": 0.6}, "geneval": {"overall,none": 0.62}})
    card = card_of(tmp_path)
    row = row_of(card, "GQA")
    assert row.ours[tmp_path.name].value == pytest.approx(60.0) and not row.ours[tmp_path.name].differs
    assert row.theirs["UniTok"].value == 61.1
    assert "| GQA | 60.0 | 61.1 | 58.3 | 62.7 | 62.0 |" in card.as_markdown()
    assert "- **UniTok**: GQA: UniTok README, unified MLLM (256x256, Llama-2-7B)" in card.as_markdown()


def test_a_limited_run_is_marked(tmp_path):
    write(tmp_path, {"gqa": {"exact_match,none": 0.6}}, asked=10)
    text = card_of(tmp_path).as_markdown()
    assert "| GQA | 60.0 *1 | 61.1 |" in text and "1. gqa: only 10 documents were evaluated" in text


@pytest.mark.parametrize(("images", "size", "comparable"), [(50000, 256, True), (50, 256, False), (50000, 48, False)])
def test_rfid_is_comparable_at_the_published_number_and_size(tmp_path, images, size, comparable):
    write(tmp_path, reconstruction(images, size, **{"rfid,none": 0.5}))
    cell = row_of(card_of(tmp_path), "rFID").ours[tmp_path.name]
    assert bool(cell.differs) is not comparable


def test_a_missing_rfid_has_a_row_without_a_figure(tmp_path):
    write(tmp_path, reconstruction())
    text = card_of(tmp_path).as_markdown()
    assert "| rFID (lower is better) | not measured | 0.43 | 0.41 |" in text and "LPIPS" not in text


def test_baselines_follow_their_row_and_unknown_tasks_come_last(tmp_path):
    write(tmp_path, {"new": {"acc,none": 0.25}, "mmbench_scenes": {"overall,none": 0.7, "chance,none": 0.27}})
    lines = card_of(tmp_path).as_markdown().splitlines()
    assert lines[2:5] == ["| MMBench scenes | 70.0 |", "| - chance | 27.0 |", "| new: acc | 0.250 |"]


def test_folders_with_the_same_name_are_numbered(tmp_path):
    for model in "ab":
        write(tmp_path / model / "results", {"gqa": {"exact_match,none": 0.5}}, model=model)
    card = card_of(tmp_path / "a/results", tmp_path / "b/results")
    assert list(row_of(card, "GQA").ours) == ["results", "results (2)"]


def test_every_published_figure_has_a_row_and_a_source():
    rows = {benchmark.name for benchmark in card_rows()}
    for model in published():
        assert model.figures and set(model.figures) <= rows, model.name
        assert all(figure.source and figure.setting for figure in model.figures.values())
    by_authors = {"EvoTok", "UniTok", "TokenFlow", "VILA-U", "Janus-Pro", "BAGEL", "DeepGen"}
    reproduced = {"Janus-Pro", "TokenFlow", "Show-o2", "BAGEL", "Emu3.5", "DeepGen"}
    assert {model.name for model in published()} == by_authors | {f"{name} (TorchUMM)" for name in reproduced}


def test_reproductions_are_in_the_units_of_the_card():
    """TorchUMM gives GenEval in percent, and MMMU and MMBench as fractions."""
    (model,) = published(["BAGEL (TorchUMM)"])
    assert {name: figure.value for name, figure in model.figures.items()} == {
        "GenEval": 0.788, "DPG-Bench": 84.11, "MME perception": 1691.5, "MME cognition": 695.4, "MMMU": 51.9,
        "MMBench": 84.3, "MM-Vet": 65.9,
    }  # fmt: skip


def test_all_tasks_and_metrics_of_rows_exist(lmms_eval_tasks):
    manager = lmms_eval_tasks.TaskManager()
    for benchmark in card_rows():
        if benchmark.task == "mmvet":  # loads only with the key of its judge
            continue
        metrics = {metric["metric"] for metric in manager._get_config(benchmark.task)["metric_list"]}
        wanted = [benchmark.metric.split(",")[0], *filter(None, [benchmark.baseline])]
        assert set(wanted) <= metrics, benchmark.name


def test_bars_show_all_figures_and_incomparable_ones_are_hatched(tmp_path):
    write(tmp_path, {"gqa": {"exact_match,none": 0.6}, "pope": {"pope_accuracy,none": 0.8}}, asked=10)
    figure = plot_card(card_of(tmp_path))
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes if axes.patches}
    assert [round(bar.get_width(), 1) for bar in panels["GQA"].patches] == [60.0, 61.1, 58.3, 62.7, 62.0]
    assert [bool(bar.get_hatch()) for bar in panels["GQA"].patches] == [True, False, False, False, False]
    assert all(bar.get_hatch() for bar in panels["POPE"].patches)


def test_the_command_writes_table_json_and_plot(tmp_path, capsys):
    write(tmp_path / "runs", {"gqa": {"exact_match,none": 0.6}})
    assert main(["report", f"mine={tmp_path / 'runs'}", "-o", str(tmp_path / "out"), "--compare", "UniTok"]) == 0
    assert (tmp_path / "out/report.md").read_text().startswith("|  | mine | UniTok |\n")
    assert (tmp_path / "out/report.md").read_text() in capsys.readouterr().out
    content = json.loads((tmp_path / "out/report.json").read_text())
    assert content["rows"][0]["ours"]["mine"] == {"value": 60.0, "differs": ""}
    assert content["rows"][0]["published"]["UniTok"]["value"] == 61.1
    with Image.open(tmp_path / "out/report.png") as picture:
        assert picture.width > 200


def test_bad_input_is_a_user_error(tmp_path, capsys):
    def error(*arguments):
        assert main(["report", *map(str, arguments)]) == 2
        return capsys.readouterr().err

    write(tmp_path / "good", {"gqa": {"exact_match,none": 0.6}})
    (tmp_path / "none").mkdir()
    write(tmp_path / "empty", {"gqa": {}})
    (write(tmp_path / "broken", {"gqa": {}})).write_text('{"results": ')
    write(tmp_path / "two/a", {"gqa": {"exact_match,none": 0.6}}, model="a")
    write(tmp_path / "two/b", {"pope": {"pope_accuracy,none": 0.6}}, model="b")
    assert "nowhere does not exist" in error(tmp_path / "nowhere")
    assert "the run failed" in error(tmp_path / "none")
    assert "no figures for gqa" in error(tmp_path / "empty")
    assert "cannot be read" in error(tmp_path / "broken")
    assert "results of several models" in error(tmp_path / "two")
    assert "did you mean UniTok?" in error(tmp_path / "good", "--compare", "Unitok")


@pytest.mark.parametrize(
    "name",
    [
        "results.json",
        "1105_1010_llava_model_args_results.json",
        "0131_1205_results.json",
        "20241105_101010_results.json",
        "results_2024-11-05T10-10-10.123456.json",
        "run/1105_1010_llava/results.json",
    ],
)
def test_results_of_older_versions_are_found(tmp_path, name, capsys):
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {"results": {"pope": {"pope_accuracy,none": 0.86}}, "config": {"model": "m", "model_args": "a=b"}}
    file.write_text(json.dumps(content))
    (tmp_path / "submissions").mkdir()
    (tmp_path / "submissions/mmbench_results.json").write_text('{"results": {"a": 1}}')
    (tmp_path / "submissions/vqav2_results.json").write_text("[1, 2")
    assert main(["report", str(tmp_path)]) == 0
    assert "| POPE | 86.0 |" in capsys.readouterr().out
    run = read_run(tmp_path)
    assert list(run.tasks) == ["pope"] and run.model == "a=b" and run.unreadable == ()


def test_results_of_a_version_without_filters(tmp_path):
    content = {"results": {"gqa": {"exact_match": 0.5, "exact_match_stderr": 0.1, "samples": 9}}, "versions": {}}
    (tmp_path / "results.json").write_text(json.dumps(content))
    assert read_run(tmp_path).tasks["gqa"].figures == {"exact_match": 0.5}


def test_a_task_without_a_figure_is_listed_with_the_others(tmp_path, capsys):
    results = {
        "gqa": {"submission,none": None},
        "vqav2_test": {"submission,none": "vqav2.json"},
        "by_topic": {"score,none": {"color": 1.0}},
        "pope": {"pope_accuracy,none": 0.86},
    }
    write(tmp_path, results)
    assert main(["report", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "| POPE | 86.0 |" in text and "| vqav2_test | no figure |" in text and "| by_topic | no figure |" in text
    assert "| GQA | no figure |" in text and "vqav2_test 100 documents" in text and "nothing" not in text


def test_an_unreadable_file_is_listed_with_the_results_of_the_others(tmp_path, capsys):
    write(tmp_path / "good", {"gqa": {"exact_match,none": 0.6}})
    write(tmp_path / "bad", {"pope": {}}).write_text('{"results": ')
    assert main(["report", str(tmp_path), "-o", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "| GQA | 60.0 |" in text and "Not readable:" in text and "bad/20260101_000000_results.json" in text
    assert len(json.loads((tmp_path / "out/report.json").read_text())["runs"][0]["unreadable"]) == 1
