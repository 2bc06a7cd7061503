"""Reading of lmms-eval's results files."""

import json
import os

import pytest

from eval_tasks.cli import main
from eval_tasks.reporting.results import read_results

RESULTS = {
    "results": {
        "mmbench_scenes": {
            "alias": "mmbench_scenes",
            "overall,none": 0.75,
            "overall_stderr,none": 0.01,
            "overall_stderr_clt,none": "N/A",
            "chance,none": 0.27,
            "submission,none": None,
        },
        "other": {"alias": "other", "acc,strict": 1, "acc,none": 0.5},
    }
}


def write(folder, name, results, age=0.0):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results))
    time = path.stat().st_mtime - age
    os.utime(path, (time, time))
    return time


def test_newest_file_as_plain_figures(tmp_path):
    write(tmp_path / "a__b", "20260101_000000_results.json", {"results": {"old": {"x,none": 1.0}}}, age=100)
    write(tmp_path / "a__b", "20260102_000000_results.json", RESULTS)
    write(tmp_path / "submissions", "mmbench_en_dev_static_results.json", {"overall_acc": 1})
    assert read_results(tmp_path, tasks=["mmbench_scenes"]) == {
        "mmbench_scenes": {"overall": 0.75, "chance": 0.27},
        "other": {"acc,strict": 1.0, "acc": 0.5},
    }


def test_failed_runs_are_user_errors(tmp_path):
    with pytest.raises(ValueError, match="the run failed"):
        read_results(tmp_path)
    written = write(tmp_path, "20260102_000000_results.json", RESULTS, age=100)
    with pytest.raises(ValueError, match="1 from earlier runs"):
        read_results(tmp_path, not_before=written + 50)
    with pytest.raises(ValueError, match="no figures for geneval_scenes"):
        read_results(tmp_path, tasks=["geneval_scenes"])
    (tmp_path / "20260103_000000_results.json").write_text("{")
    with pytest.raises(ValueError, match="results.json cannot be read"):
        read_results(tmp_path)


@pytest.mark.parametrize(
    "changed",
    [
        {"results": {**RESULTS["results"], "a": None, "b": {"file,none": {"x": 1}}, "big": {"x,none": 1e300}}},
        {**RESULTS, "group_subtasks": [], "n-samples": "x", "config": "y", "model_name": {"a": 1}},
    ],
)  # fmt: skip
def test_a_bad_part_has_no_figure_and_the_others_have(tmp_path, capsys, changed):
    write(tmp_path, "results.json", changed)
    assert main(["report", str(tmp_path), "-o", str(tmp_path / "report")]) == 0
    printed = capsys.readouterr().out
    assert "75.0" in printed and printed.count("no figure") == (3 if "big" in changed["results"] else 0)
    assert (tmp_path / "report" / "report.png").is_file()


@pytest.mark.parametrize("name", ["results.json", "1105_1010_llava_results.json", "20241105_101010_results.json"])
def test_older_names_are_found(tmp_path, name):
    write(tmp_path / "a__b", name, RESULTS)
    assert set(read_results(tmp_path)) == {"mmbench_scenes", "other"}


def test_a_group_has_no_figures_of_its_own(tmp_path):
    results = {**RESULTS["results"], "all": {"alias": "all", " ": ""}}
    members = {"all": ["mmbench_scenes", "other"], "mmbench_scenes": [], "other": []}
    write(tmp_path, "20260103_000000_results.json", {"results": results, "group_subtasks": members})
    assert set(read_results(tmp_path)) == {"mmbench_scenes", "other"}
    with pytest.raises(ValueError, match="no figures for all"):
        read_results(tmp_path, tasks=["all"])
