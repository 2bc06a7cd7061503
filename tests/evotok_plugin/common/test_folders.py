"""Folders that are complete or absent."""

import json

import pytest

from evotok_plugin.common.folders import check_new_folder, scratch_folder, whole_folder, write_whole_folder
from evotok_plugin.common.owned_folder import MARKER, OwnedFolder
from evotok_plugin.errors import UserError


def test_a_whole_folder_is_complete_or_absent(tmp_path):
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "out") as folder:
        (folder / "half").touch()
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    (tmp_path / ".out.part").mkdir()  # of another program
    (tmp_path / ".out.part" / "notes.txt").touch()
    with whole_folder(tmp_path / "out") as folder:
        (folder / "whole").touch()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["whole"]
    assert (tmp_path / ".out.part" / "notes.txt").exists()
    with pytest.raises(UserError, match="exists and is not empty"), whole_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / "whole").exists()


def test_a_folder_with_nothing_but_the_marker_counts_as_empty(tmp_path):
    OwnedFolder(tmp_path / "out").claim("recipe.yaml")
    with whole_folder(tmp_path / "out") as folder:
        (folder / "whole").touch()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["whole"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / MARKER).write_text("{}")  # not a marker of this program
    with pytest.raises(UserError, match="is not empty"):
        check_new_folder(tmp_path / "other")


def test_the_leftover_of_a_killed_process_is_replaced(tmp_path):
    (tmp_path / ".out.part").mkdir()
    (tmp_path / ".out.part" / MARKER).write_text(json.dumps({"program": "evotok", "temporary": True}))
    (tmp_path / ".out.part" / "half").touch()
    with whole_folder(tmp_path / "out") as folder:
        (folder / "whole").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_folder_whose_writing_fails_leaves_nothing(tmp_path, error):
    def write(folder):
        (folder / "half").touch()
        if isinstance(error, OSError):
            error.filename = str(folder / "model.safetensors")
        raise error

    with pytest.raises((UserError, KeyboardInterrupt)) as raised:
        write_whole_folder(tmp_path / "out", write)
    assert not list(tmp_path.iterdir())
    if isinstance(error, OSError):
        assert str(raised.value).startswith(f"{tmp_path / 'out' / 'model.safetensors'} cannot be written: No space")


@pytest.mark.parametrize(("folder", "named"), [("file/out", "file/out"), ("/proc/nowhere/out", "/proc/nowhere")])
def test_a_folder_that_cannot_be_created_is_named(tmp_path, folder, named):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"^{tmp_path / named} cannot be written: "):
        write_whole_folder(tmp_path / folder, lambda folder: None)


def test_a_path_without_a_name_is_not_a_new_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("", ".", "/"):
        with pytest.raises(UserError, match="expected the name of a new folder, got '[./]'"):
            write_whole_folder(path, lambda folder: None)


def test_a_scratch_folder_is_removed_at_the_end(tmp_path):
    with scratch_folder(tmp_path / "out") as folder:
        (folder / "file").touch()
        assert not (tmp_path / "out").exists()
    assert not list(tmp_path.iterdir())
