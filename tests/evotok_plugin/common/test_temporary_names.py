"""Temporary files of processes that end, run, or belong to other machines."""

import multiprocessing
import os

from evotok_plugin.common.files import write_text
from evotok_plugin.common.folders import whole_folder
from evotok_plugin.common.temporary_names import own_temporary_path, remove_abandoned


def leave_files(folder):
    own_temporary_path(folder / "a").write_text("half")
    own_temporary_path(folder / "out").mkdir()
    (own_temporary_path(folder / "out")).mkdir()


def test_only_files_of_processes_that_have_ended_are_removed(tmp_path):
    child = multiprocessing.get_context("fork").Process(target=leave_files, args=(tmp_path,))
    child.start()
    child.join()
    mine = own_temporary_path(tmp_path / "a")
    mine.write_text("half")
    other = tmp_path / f".a.00000000-{child.pid}-00000000.part"  # of another machine
    other.touch()
    assert len(list(tmp_path.iterdir())) == 5
    write_text(tmp_path / "a", "whole", shared=True)
    with whole_folder(tmp_path / "out") as folder:
        (folder / "file").touch()
    assert {path.name for path in tmp_path.iterdir()} == {"a", "out", mine.name, other.name}
    remove_abandoned(tmp_path / "nowhere" / "a")


def test_processes_that_fill_the_same_folder_do_not_disturb_each_other(tmp_path):
    with whole_folder(tmp_path / "out") as first:
        (first / "a").touch()
        with whole_folder(tmp_path / "other") as second:
            assert first != second
        with whole_folder(tmp_path / "out2") as second:
            (second / "a").touch()
        assert (first / "a").exists()


def test_long_names_get_short_temporary_names(tmp_path):
    path = tmp_path / ("ä" * 127)
    assert len(os.fsencode(own_temporary_path(path).name)) <= 255
    write_text(path, "text", shared=True)
    assert list(tmp_path.iterdir()) == [path]
