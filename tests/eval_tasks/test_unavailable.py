"""Tasks that cannot run: the first line of the output, early refusal, and runs that leave them out."""

import os
import subprocess
import sys

import pytest

from eval_tasks import unavailable
from evotok_plugin.errors import UserError

MMBENCH = ["mmbench", "geneval"]


@pytest.mark.parametrize(
    ("words", "tasks"),
    [
        (["--tasks", "mmbench,geneval", "--limit", "2"], MMBENCH),
        (["eval", "--tasks=mmbench,geneval"], MMBENCH),
        (["--tasks"], []),
        (["models"], []),
    ],
)
def test_tasks_of_a_command_line(words, tasks):
    assert unavailable.requested_tasks(words) == tasks


def test_the_warning_names_the_cause_the_consequence_and_three_remedies():
    text = unavailable.login_warning(MMBENCH, has_login=False, has_local_data=False, skips=False)
    assert text.startswith("mmbench: ") and "need a Hugging Face login" in text and "ends before geneval" in text
    for remedy in ("hf auth login", "mmbench_en_dev_static", "EVOTOK_DATA_ROOT=DATA", "EVOTOK_SKIP_UNAVAILABLE=1"):
        assert remedy in text
    skipping = unavailable.login_warning(MMBENCH, has_login=False, has_local_data=False, skips=True)
    assert "is left out" in skipping and "ends before" not in skipping
    assert "ends before" not in unavailable.login_warning(["mmbench"], False, False, False)


@pytest.mark.parametrize(
    ("tasks", "login", "local"), [(["geneval"], False, False), (MMBENCH, True, False), (MMBENCH, False, True)]
)
def test_no_warning_where_nothing_is_missing(tasks, login, local):
    assert unavailable.login_warning(tasks, login, local, False) == ""


def test_the_warning_is_the_first_line_of_lmms_eval(tmp_path):
    """With an unknown task the program ends before it loads a model."""
    words = ["--tasks", "mmbench,geneval,unheard_of"]
    command = [sys.executable, "-m", "lmms_eval", *words]
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "EVOTOK_DATA_ROOT"):
        environment.pop(name, None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert lines[0].startswith("WARNING: mmbench: upstream's six tasks need a Hugging Face login"), lines[:5]


def test_a_task_that_demands_a_login_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(unavailable, "has_login", lambda: False)
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="gedit: upstream's task reads owner/GEdit with a Hugging Face login.*hf auth"):
        unavailable.check_login("gedit", "owner/GEdit", {"token": True})
    unavailable.check_login("gedit", "owner/GEdit", {})
    unavailable.check_login("gedit", "json", {"token": True})
    unavailable.check_login("gedit", str(tmp_path), {"token": True})
    (tmp_path / "owner___g_edit").mkdir()  # as `datasets` names its copies
    unavailable.check_login("gedit", "owner/GEdit", {"token": True})
    monkeypatch.setattr(unavailable, "has_login", lambda: True)
    unavailable.check_login("other", "owner/Other", {"token": True})


def test_the_variable_is_0_or_1():
    assert unavailable.skips_unavailable({"EVOTOK_SKIP_UNAVAILABLE": "1"})
    assert not unavailable.skips_unavailable({}) and not unavailable.skips_unavailable({"EVOTOK_SKIP_UNAVAILABLE": "0"})
    with pytest.raises(UserError, match="must be 0 or 1, got 'yes'"):
        unavailable.skips_unavailable({"EVOTOK_SKIP_UNAVAILABLE": "yes"})


def test_what_can_run_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr(unavailable, "_LEFT_OUT", {})
    groups = {"suite": ["bad", "good", "inner"], "inner": ["fine"]}

    def load(name):
        if name in ("suite", "inner", "bad"):
            raise OSError("no\n data")
        return {name: f"task {name}"}

    loaded = unavailable.load_available(load, lambda name: groups.get(name, []), ["suite", "last"])
    assert loaded == {"good": "task good", "fine": "task fine", "last": "task last"}
    unavailable._list_left_out()
    assert capsys.readouterr().err == "NOT MEASURED bad: no data\n"
    with pytest.raises(UserError, match=r"none of the tasks can run: bad \(no data\)"):
        unavailable.load_available(load, lambda name: [], ["bad"])


def test_a_run_continues_without_the_tasks_that_cannot_run(make_lm, evaluate, monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(unavailable, "_LEFT_OUT", {})
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/absent.yaml").write_text(
        "task: absent\ndataset_path: owner/absent\ndataset_kwargs: {token: True}\ntest_split: test\n"
        "output_type: generate_until\ndoc_to_text: question\ndoc_to_target: answer\n"
        "metric_list: [{metric: exact_match}]\n"
    )
    (tmp_path / "tasks/both.yaml").write_text("group: both\ntask: [absent, mmbench_scenes]\n")
    monkeypatch.setattr(unavailable, "has_login", lambda: False)
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "cache"))
    tasks, given = ["both", "geneval"], {"limit": 2, "include_path": str(tmp_path / "tasks")}
    monkeypatch.setenv("EVOTOK_JUDGE_DETECTOR", str(tmp_path / "no_judge"))
    with pytest.raises(UserError, match="absent: upstream's task reads owner/absent with a Hugging Face login"):
        evaluate(make_lm(), tasks, **given)
    monkeypatch.setenv(unavailable.SKIP_VARIABLE, "1")
    results = evaluate(make_lm(), tasks, **given)["results"]
    assert set(results) == {"mmbench_scenes"}
    assert "left out: absent: " in caplog.text and "left out: geneval: " in caplog.text
    assert set(unavailable._LEFT_OUT) == {"absent", "geneval"}
