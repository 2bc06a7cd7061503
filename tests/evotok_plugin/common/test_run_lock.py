"""Locks of output folders."""

import errno
import fcntl

import pytest
from other_process import in_other_process

from evotok_plugin.common.folders import write_whole_folder
from evotok_plugin.common.locks import LOCK, locked
from evotok_plugin.common.run_lock import only_run
from evotok_plugin.errors import UserError


def use(folder):
    with only_run(folder):
        (folder / "result").write_text("")


def test_a_folder_has_one_run_at_a_time(tmp_path):
    with only_run(tmp_path / "run"):
        assert f"another run is writing to {tmp_path / 'run'}" in in_other_process(use, tmp_path / "run")
        assert in_other_process(use, tmp_path / "other") == ""
        (tmp_path / "run" / "mine").write_text("")
    assert in_other_process(use, tmp_path / "run") == ""


def test_a_new_folder_that_is_not_used_is_removed(tmp_path):
    with pytest.raises(UserError, match="no data"), only_run(tmp_path / "run"):
        raise UserError("no data")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "old").mkdir()
    with only_run(tmp_path / "old"):
        pass
    assert [path.name for path in (tmp_path / "old").iterdir()] == [LOCK]


def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    use(tmp_path)
    assert "the file system has no locks" in caplog.text and (tmp_path / "result").exists()


def test_a_folder_that_is_being_filled_is_not_taken_for_a_leftover(tmp_path):
    def fill(temporary):
        (temporary / "part").write_text("")
        assert "another run is writing" in in_other_process(write_whole_folder, tmp_path / "out", lambda folder: None)
        assert (temporary / "part").exists()

    write_whole_folder(tmp_path / "out", fill)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_removed_lock_file_does_not_count(tmp_path):
    with locked(tmp_path / "a.lock", tmp_path):
        (tmp_path / "a.lock").unlink()
        with locked(tmp_path / "a.lock", tmp_path):
            assert (tmp_path / "a.lock").exists()
    assert not (tmp_path / "a.lock").exists()
