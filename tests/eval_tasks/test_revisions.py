"""Data sets of the hub are requested at fixed revisions, which the results record."""

import re
from pathlib import Path

import pytest

from eval_tasks.judging import weights
from eval_tasks.revisions import PINNED, given_revisions, revision_of
from evotok_plugin.errors import UserError


def test_pins_are_complete_commits_of_data_sets_that_upstream_reads(lmms_eval_tasks):
    import lmms_eval.tasks

    read = "".join(file.read_text() for file in Path(lmms_eval.tasks.__file__).parent.rglob("*yaml"))
    for name, revision in PINNED.items():
        assert re.fullmatch(r"[0-9a-f]{40}", revision) and f"dataset_path: {name}\n" in read, name


def test_a_given_revision_takes_precedence():
    given = {"EVOTOK_DATA_REVISIONS": "lmms-lab-encoder/POPE=main, me/mine=v1"}
    assert revision_of("lmms-lab-encoder/POPE", given) == "main" and revision_of("me/mine", given) == "v1"
    assert revision_of("lmms-lab-encoder/POPE", {}) == PINNED["lmms-lab-encoder/POPE"]
    assert revision_of("me/mine", {}) is None
    with pytest.raises(UserError, match="expected OWNER/NAME=REVISION"):
        given_revisions({"EVOTOK_DATA_REVISIONS": "main"})


def test_the_revision_reaches_the_hub_and_the_results(lmms_eval_tasks, tmp_path, monkeypatch):
    import datasets

    asked = []

    def load_dataset(**arguments):
        asked.append(arguments)
        return datasets.DatasetDict({"test": datasets.Dataset.from_list([{"question": "q", "answer": "a"}])})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = "dataset_path: {path}\ntest_split: test\noutput_type: generate_until\ndoc_to_text: question\n"
    task += "doc_to_target: answer\nmetric_list: [{{metric: exact_match}}]\ntask: {name}\n"
    (tmp_path / "a.yaml").write_text(task.format(path="lmms-lab-encoder/POPE", name="pinned"))
    (tmp_path / "b.yaml").write_text(task.format(path="me/mine", name="free"))
    manager = lmms_eval_tasks.TaskManager(include_path=str(tmp_path), include_defaults=False)
    loaded = manager.load_task_or_group(["pinned", "free"], "chat")
    by_path = {arguments["path"]: arguments.get("revision") for arguments in asked}
    assert by_path == {"lmms-lab-encoder/POPE": PINNED["lmms-lab-encoder/POPE"], "me/mine": None}
    assert loaded["pinned"].config.metadata["revision"] == PINNED["lmms-lab-encoder/POPE"]
    assert not loaded["free"].config.metadata


def test_a_pin_that_the_hub_lacks_is_logged_and_left_out(lmms_eval_tasks, tmp_path, monkeypatch, caplog):
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    asked = []

    def load_dataset(**arguments):
        asked.append(arguments.get("revision"))
        if asked[-1]:
            raise DatasetNotFoundError(f"Revision '{asked[-1]}' doesn't exist for dataset 'x' on the Hub.")
        return datasets.DatasetDict({"test": datasets.Dataset.from_list([{"question": "q", "answer": "a"}])})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)
    (tmp_path / "a.yaml").write_text(
        "task: pinned\ndataset_path: lmms-lab-encoder/POPE\ntest_split: test\noutput_type: generate_until\n"
        "doc_to_text: question\ndoc_to_target: answer\nmetric_list: [{metric: exact_match}]\n"
    )
    manager = lmms_eval_tasks.TaskManager(include_path=str(tmp_path), include_defaults=False)
    loaded = manager.load_task_or_group(["pinned"], "chat")["pinned"]
    assert (
        asked[0] == PINNED["lmms-lab-encoder/POPE"] and asked[-1] is None and "its current state is used" in caplog.text
    )
    assert "revision" not in loaded.config.metadata
    monkeypatch.setenv("EVOTOK_DATA_REVISIONS", "lmms-lab-encoder/POPE=gone")
    with pytest.raises(DatasetNotFoundError, match="'gone' doesn't exist"):
        manager.load_task_or_group(["pinned"], "chat")


def test_judges_can_be_pinned(monkeypatch, tmp_path):
    asked = {}

    def snapshot_download(repository, **arguments):
        asked.update(arguments, repository=repository)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert weights.fetch("owner/name@abc", "the judge", "X") == tmp_path
    assert (asked["repository"], asked["revision"]) == ("owner/name", "abc")
    weights.fetch("owner/name", "the judge", "X")
    assert asked["revision"] is None
