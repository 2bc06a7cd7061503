"""Encoding that is extended, killed or stopped by a signal, and then resumed."""

import os
import signal
import time

import pytest
from encoding_runs import LIMIT_S, Noise, encode, expected, files, in_child, mapping, num_shards, open_files, wait_for

from evotok_plugin.data.code_cache import CodeCache


def test_new_images_are_added_in_new_shards(model, tmp_path):
    encode(tmp_path, Noise(10), model)
    before = files(tmp_path)
    source = Noise(25)
    cache = encode(tmp_path, source, model)
    assert source.opened == list(range(10, 25))
    assert mapping(cache) == expected(source, model)
    assert before.items() <= files(tmp_path).items()


def test_a_finished_cache_is_not_written_and_images_are_not_opened(model, tmp_path):
    encode(tmp_path, Noise(10), model)
    before = {path.name: path.stat().st_mtime_ns for path in [tmp_path, *tmp_path.iterdir()]}
    source = Noise(10)
    assert len(encode(tmp_path, source, model)) == 10 and not source.opened
    assert {path.name: path.stat().st_mtime_ns for path in [tmp_path, *tmp_path.iterdir()]} == before


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_image_is_encoded_once_after_kills_at_random_times(model, tmp_path, rng, num_workers):
    source = Noise(100, seconds=0.004)
    for attempt in range(6):
        shards = num_shards(tmp_path)
        child = in_child(encode, tmp_path, source, model, num_workers=num_workers)
        if attempt % 2:
            wait_for(lambda: num_shards(tmp_path) > shards or not child.is_alive())  # noqa: B023 - called immediately
        time.sleep(float(rng.uniform(0, 0.06)))
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
    wait_for(lambda: not open_files(tmp_path))  # their data-loading processes have also ended
    cache = encode(tmp_path, source, model)
    assert len(source.opened) <= 100 - 3 * 7  # the killed runs have written some shards
    assert mapping(cache) == expected(Noise(100), model) and cache.verify() == []
    assert not list(tmp_path.glob("*.part"))


def _killed_at_rename(folder, source, model, number, after):
    """Encode, and kill the process before or after it renames the file of this number."""
    rename, renamed = os.replace, []

    def replace(*paths):
        if after:
            rename(*paths)
        if len(renamed) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        renamed.append(paths)
        if not after:
            rename(*paths)

    os.replace = replace
    encode(folder, source, model)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("number", range(5))  # cache.json, then two shards' .npy and .json
def test_a_kill_between_two_files_neither_loses_nor_duplicates_images(model, tmp_path, number, after):
    child = in_child(_killed_at_rename, tmp_path, Noise(17), model, number, after)
    child.join()
    assert child.exitcode == -signal.SIGKILL
    source = Noise(17)
    cache = encode(tmp_path, source, model)
    finished = max(0, number - 1 + after) // 2
    assert source.opened == list(range(7 * finished, 17))
    assert mapping(cache) == expected(source, model)
    assert {path.suffix for path in tmp_path.glob("shard-*")} == {".npy", ".json"} and len(files(tmp_path)) == 6


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_a_run_and_keeps_encoded_images(model, tmp_path_factory, number):
    tmp_path, gate = tmp_path_factory.mktemp("codes"), tmp_path_factory.mktemp("gate") / "open"
    child = in_child(_encode_in_own_group, tmp_path, Noise(300, gate=gate), model)
    wait_for(lambda: num_shards(tmp_path))
    os.killpg(child.pid, number)  # like a terminal, which also signals the data-loading processes
    gate.touch()  # only now can the run pass its first 50 images
    child.join(LIMIT_S)
    assert child.exitcode == 128 + number
    cache = CodeCache(tmp_path)
    assert 7 <= len(cache) < 300 and len(cache) % 7 in (0, 3, 6)  # the batches of a shard have 3, 3 and 1 images
    assert len(encode(tmp_path, Noise(40), model)) >= 40 and CodeCache(tmp_path).verify() == []


def _encode_in_own_group(folder, source, model):
    os.setpgid(0, 0)
    encode(folder, source, model, num_workers=2)
