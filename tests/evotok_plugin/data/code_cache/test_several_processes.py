"""Encoding by two processes, and two runs on one cache."""

import os
import signal
import socket

import pytest
from encoding_runs import SIZE, Noise, encode, expected, files, in_child, mapping, num_shards, options, wait_for

from evotok_plugin.common.processes import Processes
from evotok_plugin.data.code_cache import CodeCache, encode_images
from evotok_plugin.data.sources import FileSource
from evotok_plugin.errors import UserError


def _rank(rank, port, folder, source, model, values):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    processes = Processes.join("cpu")
    try:
        encode_images(folder, source, model, SIZE, processes, options(**values))
    except UserError as error:
        (folder.parent / f"error{rank}").write_text(str(error))
    processes.leave()


def two_processes(folder, source, model, **values):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [in_child(_rank, rank, port, folder, source, model, values) for rank in range(2)]


def joined(children) -> list[int]:
    for child in children:
        child.join(60)
    return [child.exitcode for child in children]


def test_two_processes_write_the_files_that_one_writes(model, tmp_path):
    source = Noise(31)
    encode(tmp_path / "one", source, model)
    assert joined(two_processes(tmp_path / "two", source, model)) == [0, 0]
    assert len(files(tmp_path / "one")) == 10 and files(tmp_path / "two") == files(tmp_path / "one")


def test_two_processes_agree_on_changed_and_moved_files(model, tmp_path):
    """8 of 20 files are in the cache under their old paths, and one of these has changed."""
    folder, moved = tmp_path / "images", tmp_path / "moved"
    folder.mkdir()
    source = Noise(20)
    for index in range(20):
        source.picture(index).save(folder / f"{index:02d}.png")
    for name in ("one", "two"):
        encode(tmp_path / name, FileSource(folder, [f"{index:02d}.png" for index in range(8)]), model)
    folder.rename(moved)
    source.picture(19).save(moved / "03.png")
    encode(tmp_path / "one", FileSource(moved), model)
    assert joined(two_processes(tmp_path / "two", FileSource(moved), model)) == [0, 0]
    assert len(files(tmp_path / "one")) == 10 and files(tmp_path / "two") == files(tmp_path / "one")
    assert mapping(CodeCache(tmp_path / "two", source=FileSource(moved))) == expected(FileSource(moved), model)


def test_one_process_resumes_a_run_of_two(model, tmp_path):
    folder, source = tmp_path / "codes", Noise(60, seconds=0.01)
    children = two_processes(folder, source, model)
    wait_for(lambda: num_shards(folder) >= 2)
    for child in children:
        os.kill(child.pid, signal.SIGKILL)
    assert joined(children) == [-signal.SIGKILL] * 2
    cache = encode(folder, source, model)
    assert len(source.opened) <= 46 and mapping(cache) == expected(Noise(60), model)


def test_a_signal_to_one_process_stops_all(model, tmp_path):
    folder, source = tmp_path / "codes", Noise(300, seconds=0.01)
    children = two_processes(folder, source, model)
    wait_for(lambda: num_shards(folder))
    os.kill(children[1].pid, signal.SIGTERM)
    assert joined(children) == [143, 143]
    assert 7 <= len(CodeCache(folder)) < 300


def test_errors_are_raised_in_all_processes(model, tmp_path):
    children = two_processes(tmp_path / "codes", Noise(20, broken=(3, 11)), model, max_bad_fraction=0.01)
    assert joined(children) == [0, 0]
    for rank in range(2):
        assert "of 20 samples are unusable" in (tmp_path / f"error{rank}").read_text()


class Failing(Noise):
    """Has a bug that only the second of two processes meets."""

    def stamp(self, index: int) -> bytes:
        if index >= 10:
            raise RuntimeError("a bug")
        return bytes(16)


def test_a_bug_in_one_process_ends_the_others_and_keeps_its_traceback(model, tmp_path):
    assert joined(two_processes(tmp_path / "codes", Failing(20), model)) == [0, 1]
    assert (tmp_path / "error0").read_text() == "another process failed: RuntimeError: a bug"


def test_a_second_run_is_rejected_until_the_first_has_ended(model, tmp_path):
    source = Noise(300, seconds=0.01)
    child = in_child(encode, tmp_path, source, model, num_workers=2)
    wait_for(lambda: num_shards(tmp_path))
    with pytest.raises(UserError, match="another run is writing to .*wait until it has ended"):
        encode(tmp_path, Noise(300), model)
    assert len(encode(tmp_path, Noise(7), model)) >= 7  # nothing to write, so no lock is needed
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert len(encode(tmp_path, Noise(20), model)) >= 20  # although its data-loading processes may still run


def test_a_surviving_process_of_a_killed_run_excludes_other_runs(model, tmp_path):
    folder = tmp_path / "codes"
    children = two_processes(folder, Noise(60, seconds=0.01), model)
    wait_for(lambda: num_shards(folder))
    os.kill(children[1].pid, signal.SIGSTOP)
    os.kill(children[0].pid, signal.SIGKILL)
    children[0].join()
    with pytest.raises(UserError, match="another run is writing"):
        encode(folder, Noise(60), model)
    os.kill(children[1].pid, signal.SIGKILL)
    children[1].join()
    assert mapping(encode(folder, Noise(60), model)) == expected(Noise(60), model)
