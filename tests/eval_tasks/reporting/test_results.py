"""Reading of lmms-eval's results files."""

import json
import os

import pytest

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
    with pytest.raises(ValueError, match="not an lmms-eval results file"):
        read_results(tmp_path)


def test_a_group_has_no_figures_of_its_own(tmp_path):
    results = {**RESULTS["results"], "all": {"alias": "all", " ": ""}}
    members = {"all": ["mmbench_scenes", "other"], "mmbench_scenes": [], "other": []}
    write(tmp_path, "20260103_000000_results.json", {"results": results, "group_subtasks": members})
    assert set(read_results(tmp_path)) == {"mmbench_scenes", "other"}
    with pytest.raises(ValueError, match="no figures for all"):
        read_results(tmp_path, tasks=["all"])
