"""Files and folders: modes, outputs that are checked first, and what may be deleted."""

import json
import os
import stat

import pytest
import torch

from evotok_plugin import EvoTokConfig, EvoTokModel
from evotok_plugin.common.files import check_new_folder, check_output_file, check_output_folder, whole_folder
from evotok_plugin.common.owned_folder import MARKER, OwnedFolder, check_replaceable
from evotok_plugin.common.processes import resolve_device
from evotok_plugin.metrics.frechet import FeatureStatistics
from evotok_plugin.training.checkpoints import write_checkpoint


@pytest.fixture(params=[0o022, 0o077])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_weights_have_the_mode_that_the_umask_asks_for(umask, tmp_path):
    EvoTokModel(EvoTokConfig.preset("tiny")).save_pretrained(tmp_path / "model")
    (tmp_path / "run").mkdir()
    write_checkpoint(tmp_path / "run", 3, {"step": torch.tensor(3)}, keep=2)
    FeatureStatistics(2).save(tmp_path / "run" / "statistics.safetensors")
    with whole_folder(tmp_path / "whole") as folder:
        (folder / "model.safetensors").touch(0o600)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 6
    for path in files:
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask, path
    assert stat.S_IMODE((tmp_path / "whole").stat().st_mode) == 0o777 & ~umask


def test_a_whole_folder_is_there_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "out") as folder:
        (folder / "half").touch()
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    (tmp_path / ".out.part").mkdir()  # of someone else
    (tmp_path / ".out.part" / "notes.txt").touch()
    with whole_folder(tmp_path / "out") as folder:
        (folder / "whole").touch()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["whole"]
    assert (tmp_path / ".out.part" / "notes.txt").exists()
    with pytest.raises(ValueError, match="exists and is not empty"), whole_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / "whole").exists()


def test_a_folder_with_nothing_but_the_marker_counts_as_empty(tmp_path):
    OwnedFolder(tmp_path / "out").claim("recipe.yaml")
    with whole_folder(tmp_path / "out") as folder:
        (folder / "whole").touch()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["whole"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / MARKER).write_text("{}")  # not a marker of this program
    with pytest.raises(ValueError, match="is not empty"):
        check_new_folder(tmp_path / "other")


def test_what_a_killed_process_left_is_replaced(tmp_path):
    (tmp_path / ".out.part").mkdir()
    (tmp_path / ".out.part" / MARKER).write_text(json.dumps({"program": "evotok", "temporary": True}))
    (tmp_path / ".out.part" / "half").touch()
    with whole_folder(tmp_path / "out") as folder:
        (folder / "whole").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


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


def test_only_what_was_claimed_is_deleted(run):
    run.delete(*run.entries)
    assert names(run.path) == [MARKER, "logs/mine.txt", "notes.txt"]
    assert OwnedFolder(run.path).entries == []


def test_a_file_of_someone_else_cannot_be_claimed(run):
    with pytest.raises(ValueError, match="notes.txt was not written by this program"):
        OwnedFolder(run.path).claim("more", "notes.txt")
    with pytest.raises(ValueError, match="mine.txt was not written"):
        OwnedFolder(run.path).claim("logs/*.txt")
    OwnedFolder(run.path).claim("weights", "logs/*.log")


def test_a_replaced_run_comes_back_or_goes(run):
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


def test_a_folder_that_was_killed_before_its_marker_is_no_obstacle(run):
    (run.path / ".replaced").mkdir()
    assert run.move_aside() and names(run.path / ".replaced") == [MARKER, "logs/a.log", "weights"]


def test_files_of_the_user_in_the_way_of_replaced_ones_stay(run):
    (run.path / ".replaced").mkdir()
    (run.path / ".replaced" / "mine").touch()
    with pytest.raises(ValueError, match="is there already; move it away"):
        run.move_aside()


def test_folders_that_hold_more_than_a_run_are_not_replaced(tmp_path, monkeypatch):
    work, home = tmp_path / "work", tmp_path / "home"
    for folder in (work / "out", home):
        folder.mkdir(parents=True)
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", str(home))
    (work / "link").symlink_to(home)
    for folder in (".", "..", "/", str(home), "link"):
        with pytest.raises(ValueError, match="--overwrite: .*--output_dir"):
            check_replaceable(folder)
    for data in ("out/data.json", "out/*.json", "out"):
        with pytest.raises(ValueError, match="holds data_path out.*, which the run reads"):
            check_replaceable("out", {"data_path": [data]})
    check_replaceable("out", {"data_path": ["data.json"], "image_folder": ["."]})


def test_outputs_are_checked_before_any_work(tmp_path):
    (tmp_path / "file").touch()
    for path, message in [("file/x", "is not a folder"), ("file", "is not a folder"), ("a.png", "expected a folder")]:
        with pytest.raises(ValueError, match=message):
            check_output_folder(tmp_path / path)
    for path, message in [("a.xyz", "got '.xyz'"), ("a", "without a suffix"), ("", "is a folder, expected a file")]:
        with pytest.raises(ValueError, match=message):
            check_output_file(tmp_path / path, [".png", ".jpg"])
    with pytest.raises(ValueError, match="cannot be written"):
        check_output_folder("/proc/evotok")
    check_output_folder(tmp_path / "new" / "v1.5")
    check_output_file(tmp_path / "new" / "a.PNG", [".png"])
    assert names(tmp_path) == ["file"]


def test_devices_are_resolved_or_refused(monkeypatch):
    assert resolve_device("cpu") == torch.device("cpu")
    for name in ("nowhere", "meta"):
        with pytest.raises(ValueError, match=f"--device {name} cannot be used here"):
            resolve_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="--device cuda cannot be used here: CUDA is not available"):
        resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="there are 2 GPUs"):
        resolve_device("cuda:2")
