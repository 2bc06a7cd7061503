"""The record of the files that a run has created: only these are moved or deleted."""

import pytest

from evotok_plugin.common.owned_folder import MARKER, OwnedFolder, check_replaceable
from evotok_plugin.errors import UserError


@pytest.fixture
def run(tmp_path):
    """A folder with two files of a run and one of the user, also in a folder of the run."""
    owned = OwnedFolder(tmp_path / "run")
    owned.claim("weights", "logs/*.log")
    (owned.path / "logs").mkdir()
    for name in ("weights", "logs/a.log", "notes.txt", "logs/mine.txt"):
        (owned.path / name).write_text(f"old {name}")
    return owned


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_only_claimed_files_are_deleted(run):
    run.delete(*run.entries)
    assert names(run.path) == [MARKER, "logs/mine.txt", "notes.txt"]
    assert OwnedFolder(run.path).entries == []


def test_a_file_of_another_program_cannot_be_claimed(run):
    with pytest.raises(UserError, match="notes.txt was not written by this program"):
        OwnedFolder(run.path).claim("more", "notes.txt")
    with pytest.raises(UserError, match="mine.txt was not written"):
        OwnedFolder(run.path).claim("logs/*.txt")
    OwnedFolder(run.path).claim("weights", "logs/*.log")


def test_a_replaced_run_is_restored_or_deleted(run):
    aside = run.move_aside()
    assert names(aside) == [MARKER, "logs/a.log", "weights"] and (run.path / "notes.txt").exists()
    new = OwnedFolder(run.path)
    new.claim("weights", "model")
    for name in ("weights", "model"):
        (run.path / name).write_text("new")
    assert OwnedFolder(run.path).restore()  # as after a kill, by a later process
    assert names(run.path) == [MARKER, "logs/a.log", "logs/mine.txt", "notes.txt", "weights"]
    assert (run.path / "weights").read_text() == "old weights"

    OwnedFolder(run.path).move_aside()
    OwnedFolder(run.path).claim("weights")
    (run.path / "weights").write_text("new")
    OwnedFolder(run.path).finish_replacing()
    assert names(run.path) == [MARKER, "logs/mine.txt", "notes.txt", "weights"]
    assert not OwnedFolder(run.path).restore() and (run.path / "weights").read_text() == "new"


def test_a_kill_before_the_marker_is_written_does_not_block_a_replacement(run):
    (run.path / ".replaced").mkdir()
    assert run.move_aside() and names(run.path / ".replaced") == [MARKER, "logs/a.log", "weights"]


def test_files_of_the_user_in_the_folder_for_replaced_ones_are_kept(run):
    (run.path / ".replaced").mkdir()
    (run.path / ".replaced" / "mine").touch()
    with pytest.raises(UserError, match="exists already; move it away"):
        run.move_aside()


def test_folders_that_contain_more_than_a_run_are_not_replaced(tmp_path, monkeypatch):
    work, home = tmp_path / "work", tmp_path / "home"
    for folder in (work / "out", home):
        folder.mkdir(parents=True)
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", str(home))
    (work / "link").symlink_to(home)
    for folder in (".", "..", "/", str(home), "link"):
        with pytest.raises(UserError, match="--overwrite: .*--output_dir"):
            check_replaceable(folder)
    for data in ("out/data.json", "out/*.json", "out"):
        with pytest.raises(UserError, match="contains data_path out.*, which the run reads"):
            check_replaceable("out", {"data_path": [data]})
    check_replaceable("out", {"data_path": ["data.json"], "image_folder": ["."]})


def test_a_record_that_cannot_be_written_names_its_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"{tmp_path}/file/run.* cannot be written"):
        OwnedFolder(tmp_path / "file" / "run").claim("weights")
