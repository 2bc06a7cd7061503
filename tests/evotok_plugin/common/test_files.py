"""Files: modes, checks of outputs, atomic replacement."""

import json
import os
import stat
import threading

import pytest
import torch

from evotok_plugin import EvoTokConfig, EvoTokModel
from evotok_plugin.common import files
from evotok_plugin.common.files import (
    cache_folder,
    check_output_file,
    check_output_folder,
    temporary_path,
    write_json,
    write_text,
    write_whole,
    writing,
)
from evotok_plugin.common.folders import whole_folder
from evotok_plugin.errors import UserError
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
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) >= 6
    for path in written:
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask, path
    assert stat.S_IMODE((tmp_path / "whole").stat().st_mode) == 0o777 & ~umask


def test_atomically_written_files_have_the_mode_of_the_umask(umask, tmp_path):
    write_whole(tmp_path / "private", lambda part: os.close(os.open(part, os.O_CREAT | os.O_WRONLY, 0o600)))
    write_text(tmp_path / "text", "text")
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o666 & ~umask}


def test_outputs_are_checked_before_any_work(tmp_path):
    (tmp_path / "file").touch()
    for path, message in [("file/x", "is not a folder"), ("file", "is not a folder"), ("a.png", "expected a folder")]:
        with pytest.raises(UserError, match=message):
            check_output_folder(tmp_path / path)
    for path, message in [("a.xyz", "got '.xyz'"), ("a", "without a suffix"), ("", "is a folder, expected a file")]:
        with pytest.raises(UserError, match=message):
            check_output_file(tmp_path / path, [".png", ".jpg"])
    with pytest.raises(UserError, match="cannot be written"):
        check_output_folder("/proc/evotok")
    check_output_folder(tmp_path / "new" / "v1.5")
    check_output_file(tmp_path / "new" / "a.PNG", [".png"])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_is_replaced_by_its_new_content(tmp_path):
    write_text(tmp_path / "a.txt", "älter\n")
    write_text(tmp_path / "a.txt", "neu \u2713\n")
    assert (tmp_path / "a.txt").read_bytes() == "neu \u2713\n".encode()
    write_json(tmp_path / "a.json", {"b": [1, None]})
    content = (tmp_path / "a.json").read_text()
    assert json.loads(content) == {"b": [1, None]} and content.startswith('{\n "b"') and content.endswith("}\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.txt"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError("a bug")])
def test_a_failed_or_interrupted_write_keeps_the_old_file_and_leaves_no_other(tmp_path, error):
    path = tmp_path / "figures.json"
    write_json(path, 1)

    def write(part):
        part.write_text("half")
        raise error

    with pytest.raises(UserError if isinstance(error, OSError) else type(error)):
        write_whole(path, write)
    assert path.read_text() == "1\n" and list(tmp_path.iterdir()) == [path]


def test_a_reader_never_sees_a_part(tmp_path):
    path = tmp_path / "figures.json"
    write_json(path, [0])

    def write(part):
        part.write_text("[1, ")
        assert json.loads(path.read_text()) == [0]
        part.write_text("[1, 2]")

    write_whole(path, write)
    assert json.loads(path.read_text()) == [1, 2]


def test_the_leftover_of_a_killed_process_is_replaced_even_where_it_is_a_link(tmp_path):
    write_text(tmp_path / "checkpoint", "weights")
    os.link(tmp_path / "checkpoint", temporary_path(tmp_path / "model"))
    write_text(tmp_path / "model", "new")
    assert (tmp_path / "checkpoint").read_text() == "weights" and (tmp_path / "model").read_text() == "new"


def test_processes_that_write_the_same_file_do_not_disturb_each_other(tmp_path):
    path = tmp_path / "cache.json"

    def write(part):
        part.write_text("first")
        write_text(path, "second", shared=True)
        assert part.read_text() == "first" and path.read_text() == "second"

    write_whole(path, write, shared=True)
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["file/x", "nowhere/x", "folder", "/proc/nowhere/x", "/proc/x"])
def test_a_file_that_cannot_be_written_is_named(tmp_path, name):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    path = tmp_path / name
    with pytest.raises(UserError) as raised:
        write_text(path, "text")
    assert str(raised.value).startswith(f"{path} cannot be written: ") and ".part" not in str(raised.value)
    assert "make room or change its permissions" in str(raised.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_the_advice_ends_the_message(tmp_path):
    with pytest.raises(UserError, match="No such file or directory; run it again$"):
        write_whole(tmp_path / "nowhere" / "x", lambda part: part.touch(), advice="run it again")


def test_the_file_that_an_error_names_takes_precedence(tmp_path):
    with pytest.raises(UserError, match="^/elsewhere cannot be written: No space left"), writing(tmp_path):
        raise OSError(28, "No space left on device", "/elsewhere")
    with pytest.raises(UserError, match=f"^{tmp_path} cannot be written: I/O"), writing(tmp_path):
        raise OSError("I/O  error")


def test_sync_flushes_the_file_before_it_is_renamed_and_its_folder_afterwards(tmp_path, monkeypatch):
    flushed = []

    def fsync(descriptor):
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        flushed.append((os.path.basename(name), (tmp_path / "state").exists()))

    monkeypatch.setattr(files.os, "fsync", fsync)
    write_whole(tmp_path / "state", lambda part: part.write_text("1"))
    assert flushed == []
    (tmp_path / "state").unlink()
    write_whole(tmp_path / "state", lambda part: part.write_text("1"), sync=True)
    assert flushed == [(".state.part", False), (tmp_path.name, True)]


def test_the_umask_is_read_without_changing_it_for_other_threads(monkeypatch):
    seen = []
    monkeypatch.setattr(files.os, "umask", seen.append)
    thread = threading.Thread(target=files.apply_umask)
    thread.start()
    thread.join()
    assert not seen


def test_the_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("frechet") == tmp_path / "evotok" / "frechet"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder("frechet") == tmp_path / "home" / ".cache" / "evotok" / "frechet"
