import contextlib
import glob
import json
import multiprocessing
import os
import pickle
import re
import signal
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

from evotok_plugin import EvoTokConfig, EvoTokModel
from evotok_plugin.cli import main
from evotok_plugin.common.processes import Processes
from evotok_plugin.data.code_cache import cache as code_cache
from evotok_plugin.data.code_cache.cache import CodeCache
from evotok_plugin.data.code_cache.encode import EncodingOptions, encode_images
from evotok_plugin.data.images import READER_VERSION
from evotok_plugin.data.sources import FileSource
from evotok_plugin.errors import UserError
from evotok_plugin.image_processing_evotok import EvoTokImageProcessor
from evotok_plugin.tokenizer_folder import open_tokenizer

SIZE = 48
_LIMIT_S = 600  # no speed is expected: this only ends a test that hangs
CHILDREN = []


class Noise:
    """Pictures of noise, all of different sizes; those in `broken` cannot be read."""

    def __init__(
        self,
        count: int,
        seconds: float = 0.0,
        broken: tuple[int, ...] = (),
        prefix: str = "noise",
        gate: Path | None = None,
    ) -> None:
        self.name, self.seconds, self.broken, self.prefix = "noise", seconds, broken, prefix
        self.gate = gate  # pictures from the 50th on wait for this file
        self.count, self.opened = count, []

    def __len__(self) -> int:
        return self.count

    def key(self, index: int) -> str:
        return f"{self.prefix}/{index:04d}.png"

    def picture(self, index: int) -> Image.Image:
        time.sleep(self.seconds)
        while self.gate is not None and index >= 50 and not self.gate.exists():
            time.sleep(0.005)
        self.opened.append(index)
        if index in self.broken:
            raise UserError(f"picture {index} is broken")
        pixels = np.random.default_rng(index).integers(0, 256, (50 + index, 60, 3), dtype=np.uint8)
        return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def model(tiny_evotok_folder):
    return open_tokenizer(str(tiny_evotok_folder), "cpu")[0]


def options(**values) -> EncodingOptions:
    given = {"shard_size": 7, "batch_size": 3, "num_workers": 0, "max_bad_fraction": 0.0, "show_progress": False}
    return EncodingOptions(**(given | values))


def encode(folder, source, model, **values) -> CodeCache:
    return encode_images(folder, source, model, SIZE, options=options(**values))


def mapping(cache: CodeCache) -> dict[str, list]:
    """All that a cache holds; a key that stands in two shards is an error."""
    keys = list(cache.keys())
    assert len(keys) == len(set(keys)) == len(cache)
    return {key: [cache.codes(key).tolist(), cache.size_of(key)] for key in sorted(keys)}


def expected(source, model, count: int | None = None) -> dict[str, list]:
    """The same, from the tokenizer, one image after another."""
    processor, result = EvoTokImageProcessor(size=SIZE), {}
    for index in range(count or len(source)):
        picture = source.picture(index)
        codes = model.encode(processor(picture).pixel_values).codes[0]
        result[source.key(index)] = [codes.tolist(), picture.size]
    return result


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("shard-*")}


def num_shards(folder) -> int:
    return len(list(folder.glob("shard-*.json")))


def open_files(folder) -> list[str]:
    """The files of a folder that processes hold open, once for each process."""
    found = []
    for descriptor in glob.glob("/proc/[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # closed meanwhile
            found.append(os.readlink(descriptor))
    return [name for name in found if name.startswith(str(folder))]


# Codes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
def test_codes_are_the_tokenizer_s_and_sizes_the_pictures_own(model, tmp_path, num_workers):
    source = Noise(17)
    cache = encode(tmp_path, source, model, num_workers=num_workers)
    assert list(cache.keys()) == [source.key(index) for index in range(17)]
    assert mapping(cache) == expected(source, model)
    assert cache.codes("noise/0003.png").dtype == torch.int64 and cache.size_of("noise/0003.png") == (60, 53)
    assert "noise/0003.png" in cache and "noise/0017.png" not in cache
    assert cache.covers(cache.keys()) and not cache.covers(["noise/0003.png", "noise/0017.png"])
    with pytest.raises(ValueError, match="holds no image 'noise/0017.png'"):
        cache.codes("noise/0017.png")


def test_an_image_takes_8_kib_at_256_positions_and_16_levels(tmp_path):
    config = EvoTokConfig.preset("tiny", image_size=256, num_quantizers=16, semantic_depth=16)
    encode_images(tmp_path, Noise(3), EvoTokModel(config).eval(), 256, options=options())
    (shard,) = tmp_path.glob("shard-*.npy")
    codes = np.load(shard, allow_pickle=False)
    assert codes.dtype == np.uint16 and codes.shape == (3, 256, 16)
    assert 0 <= shard.stat().st_size - 3 * 8192 <= 128


def test_files_left_by_a_killed_run_are_removed(model, tmp_path):
    encode(tmp_path, Noise(10), model)
    for name in ("shard-000009.npy", "shard-000010.npy.tmp", "shard-000010.json.tmp", "cache.json.tmp"):
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / "notes.tmp").write_text("mine")
    encode(tmp_path, Noise(20), model)
    numbers = range(4)  # 7 and 3 images, then 7 and 3
    left = {f"shard-00000{number}.{suffix}" for number in numbers for suffix in ("npy", "json")}
    assert {path.name for path in tmp_path.iterdir()} == left | {"cache.json", ".lock", "notes.tmp"}


def test_keys_may_be_any_file_name(model, tmp_path):
    source = Noise(4, prefix=os.fsdecode(b"caf\xe9/\xff \xc3\xa9 \"'"))  # bytes that are no UTF-8
    encode(tmp_path, source, model)
    assert mapping(CodeCache(tmp_path)) == expected(source, model)


def test_encoding_draws_no_random_numbers(model, tmp_path):
    before = torch.get_rng_state()
    encode(tmp_path, Noise(4), model, num_workers=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_data_loading_processes_share_a_cache(model, tmp_path):
    source = Noise(20)
    cache = encode(tmp_path, source, model)
    keys = [source.key(index) for index in range(20)]
    alone = [cache.codes(key) for key in keys]  # its files are open when it is forked and pickled
    loader = DataLoader([*range(20)], collate_fn=lambda indices: cache.codes(keys[indices[0]]), num_workers=2)
    assert all(torch.equal(a, b) for a, b in zip(loader, alone, strict=True))
    copy = pickle.dumps(cache)
    assert len(copy) < 20 * 9 * 8  # without the codes
    assert torch.equal(pickle.loads(copy).codes(keys[5]), alone[5])


def test_few_files_are_open_however_many_shards_there_are(model, tmp_path, monkeypatch, rng):
    monkeypatch.setattr(code_cache, "_OPEN_SHARDS", 3)
    source = Noise(20)
    cache = encode(tmp_path, source, model, shard_size=2)
    wanted = expected(source, model)
    for index in rng.permutation(np.tile(np.arange(20), 3)):
        key = source.key(int(index))
        assert cache.codes(key).tolist() == wanted[key][0]
    assert len(open_files(tmp_path)) == 3


# Going on ----------------------------------------------------------------------------------------------------


def test_a_source_that_has_grown_adds_shards_and_touches_none(model, tmp_path):
    encode(tmp_path, Noise(10), model)
    before = files(tmp_path)
    source = Noise(25)
    cache = encode(tmp_path, source, model)
    assert source.opened == list(range(10, 25))
    assert mapping(cache) == expected(source, model)
    assert before.items() <= files(tmp_path).items()


def test_a_finished_cache_opens_no_picture_and_writes_nothing(model, tmp_path):
    encode(tmp_path, Noise(10), model)
    before = {path.name: path.stat().st_mtime_ns for path in [tmp_path, *tmp_path.iterdir()]}
    source = Noise(10)
    assert len(encode(tmp_path, source, model)) == 10 and not source.opened
    assert {path.name: path.stat().st_mtime_ns for path in [tmp_path, *tmp_path.iterdir()]} == before


def in_child(function, *arguments, **values):
    """A forked child that runs a function; its exit code is 0 when the function returns."""
    child = multiprocessing.get_context("fork").Process(target=_alone, args=(function, *arguments), kwargs=values)
    child.start()
    CHILDREN.append(child)
    return child


def _alone(function, *arguments, **values):
    tqdm.set_lock(threading.RLock())  # its own is shared by forked processes: one that is killed may leave it locked
    function(*arguments, **values)


@pytest.fixture(autouse=True)
def no_child_is_left():
    yield
    while CHILDREN:
        CHILDREN[-1].kill()
        CHILDREN.pop().join()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_killed_at_random_moments_ends_with_every_image_once(model, tmp_path, rng, num_workers):
    source = Noise(100, seconds=0.004)
    for attempt in range(6):
        shards = num_shards(tmp_path)
        child = in_child(encode, tmp_path, source, model, num_workers=num_workers)
        if attempt % 2:
            _wait_for(lambda: num_shards(tmp_path) > shards or not child.is_alive())  # noqa: B023 - called at once
        time.sleep(float(rng.uniform(0, 0.06)))
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
    _wait_for(lambda: not open_files(tmp_path))  # the processes that decoded for them have ended, too
    cache = encode(tmp_path, source, model)
    assert len(source.opened) <= 100 - 3 * 7  # the killed runs have left something
    assert mapping(cache) == expected(Noise(100), model) and cache.verify() == []
    assert not list(tmp_path.glob("*.tmp"))


def _killed_at_move(folder, source, model, number, after):
    """Encode, and be killed before or after the file of this number is moved into place."""
    move, moved = os.replace, []

    def replace(*paths):
        if after:
            move(*paths)
        if len(moved) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        moved.append(paths)
        if not after:
            move(*paths)

    os.replace = replace
    encode(folder, source, model)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("number", range(5))  # cache.json, then two shards' .npy and .json
def test_a_kill_between_any_two_files_loses_and_doubles_nothing(model, tmp_path, number, after):
    child = in_child(_killed_at_move, tmp_path, Noise(17), model, number, after)
    child.join()
    assert child.exitcode == -signal.SIGKILL
    source = Noise(17)
    cache = encode(tmp_path, source, model)
    finished = max(0, number - 1 + after) // 2
    assert source.opened == list(range(7 * finished, 17))
    assert mapping(cache) == expected(source, model)
    assert {path.suffix for path in tmp_path.glob("shard-*")} == {".npy", ".json"} and len(files(tmp_path)) == 6


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_with_what_it_has_encoded(model, tmp_path_factory, number):
    tmp_path, gate = tmp_path_factory.mktemp("codes"), tmp_path_factory.mktemp("gate") / "open"
    child = in_child(_encode_in_own_group, tmp_path, Noise(300, gate=gate), model)
    _wait_for(lambda: num_shards(tmp_path))
    os.killpg(child.pid, number)  # as a terminal does: the processes that decode get it, too
    gate.touch()  # only now can the run get beyond its first 50 images
    child.join(_LIMIT_S)
    assert child.exitcode == 128 + number
    cache = CodeCache(tmp_path)
    assert 7 <= len(cache) < 300 and len(cache) % 7 in (0, 3, 6)  # a shard's batches are of 3, 3 and 1
    assert len(encode(tmp_path, Noise(40), model)) >= 40 and CodeCache(tmp_path).verify() == []


def _encode_in_own_group(folder, source, model):
    os.setpgid(0, 0)
    encode(folder, source, model, num_workers=2)


def _wait_for(condition) -> None:
    end = time.monotonic() + _LIMIT_S
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


# Several processes -------------------------------------------------------------------------------------------


def _rank(rank, port, folder, source, model, values):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    processes = Processes.join("cpu")
    try:
        encode_images(folder, source, model, SIZE, processes, options(**values))
    except ValueError as error:
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
    """One finds 8 of 20 files in a cache of their old places, and one of these has changed."""
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


def test_one_process_goes_on_where_two_were_killed(model, tmp_path):
    folder, source = tmp_path / "codes", Noise(60, seconds=0.01)
    children = two_processes(folder, source, model)
    _wait_for(lambda: num_shards(folder) >= 2)
    for child in children:
        os.kill(child.pid, signal.SIGKILL)
    assert joined(children) == [-signal.SIGKILL] * 2
    cache = encode(folder, source, model)
    assert len(source.opened) <= 46 and mapping(cache) == expected(Noise(60), model)


def test_a_signal_to_one_process_ends_all_in_order(model, tmp_path):
    folder, source = tmp_path / "codes", Noise(300, seconds=0.01)
    children = two_processes(folder, source, model)
    _wait_for(lambda: num_shards(folder))
    os.kill(children[1].pid, signal.SIGTERM)
    assert joined(children) == [143, 143]
    assert 7 <= len(CodeCache(folder)) < 300


def test_what_goes_wrong_is_raised_in_all_processes(model, tmp_path):
    children = two_processes(tmp_path / "codes", Noise(20, broken=(3, 11)), model, max_bad_fraction=0.01)
    assert joined(children) == [0, 0]
    for rank in range(2):
        assert "of 20 samples are unusable" in (tmp_path / f"error{rank}").read_text()


def test_a_second_run_on_a_folder_is_refused_until_the_first_has_ended(model, tmp_path):
    source = Noise(300, seconds=0.01)
    child = in_child(encode, tmp_path, source, model, num_workers=2)
    _wait_for(lambda: num_shards(tmp_path))
    with pytest.raises(ValueError, match="another run is writing to .*wait until it has ended"):
        encode(tmp_path, Noise(300), model)
    assert len(encode(tmp_path, Noise(7), model)) >= 7  # nothing to write: that needs no turn
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert len(encode(tmp_path, Noise(20), model)) >= 20  # though processes that decoded for it may linger


def test_a_surviving_process_of_a_killed_run_keeps_others_away(model, tmp_path):
    folder = tmp_path / "codes"
    children = two_processes(folder, Noise(60, seconds=0.01), model)
    _wait_for(lambda: num_shards(folder))
    os.kill(children[1].pid, signal.SIGSTOP)
    os.kill(children[0].pid, signal.SIGKILL)
    children[0].join()
    with pytest.raises(ValueError, match="another run is writing"):
        encode(folder, Noise(60), model)
    os.kill(children[1].pid, signal.SIGKILL)
    children[1].join()
    assert mapping(encode(folder, Noise(60), model)) == expected(Noise(60), model)


# What is refused ---------------------------------------------------------------------------------------------


def test_codes_of_another_tokenizer_or_size_are_refused(model, tmp_path):
    encode(tmp_path, Noise(3), model)
    own = model.fingerprint()
    with pytest.raises(ValueError, match=f"made by tokenizer {own[:12]} .* wanted are codes of tokenizer fedcba"):
        CodeCache(tmp_path, "fedcba9876543210")
    torch.manual_seed(1)
    other = EvoTokModel(model.config).eval()
    with pytest.raises(ValueError, match=f"{own[:12]} .* {other.fingerprint()[:12]} .*choose another folder"):
        encode(tmp_path, Noise(4), other)
    with pytest.raises(ValueError, match="images of 48 pixels, wanted are .* and 96 pixels"):
        encode_images(tmp_path, Noise(4), model, 96, options=options())
    assert len(CodeCache(tmp_path, own, SIZE)) == 3


@pytest.mark.parametrize("suffix", ["npy", "json"])
def test_a_truncated_file_is_named_and_only_its_images_are_encoded_again(model, tmp_path, suffix):
    source = Noise(20)
    encode(tmp_path, source, model)
    damaged = tmp_path / f"shard-000001.{suffix}"
    damaged.write_bytes(damaged.read_bytes()[:-10])
    for attempt in (lambda: CodeCache(tmp_path), lambda: encode(tmp_path, source, model)):
        with pytest.raises(ValueError, match=f"shard-000001.{suffix}.* delete shard-000001.npy and shard-000001.json"):
            attempt()
    for end in ("npy", "json"):
        (tmp_path / f"shard-000001.{end}").unlink()
    again = Noise(20)
    assert mapping(encode(tmp_path, again, model)) == expected(Noise(20), model)
    assert again.opened == list(range(7, 14))


@pytest.mark.parametrize("suffix", ["npy", "json"])
def test_verify_finds_a_flipped_bit(model, tmp_path, suffix, rng):
    encode(tmp_path, Noise(20), model)
    assert CodeCache(tmp_path).verify() == []
    damaged = tmp_path / f"shard-000002.{suffix}"
    content = bytearray(damaged.read_bytes())
    place = -1 if suffix == "npy" else content.index(b"0015")  # a code, a key
    content[place] ^= 1
    damaged.write_bytes(content)
    assert CodeCache(tmp_path).verify() == ["shard-000002"]


def test_a_shard_that_was_put_back_beside_its_replacement_is_named(model, tmp_path):
    encode(tmp_path, Noise(20), model)
    for suffix in ("npy", "json"):
        (tmp_path / f"shard-000009.{suffix}").write_bytes((tmp_path / f"shard-000001.{suffix}").read_bytes())
    with pytest.raises(ValueError, match="shard-000001 and shard-000009 .* the same images; delete shard-000009.npy"):
        CodeCache(tmp_path)


def test_a_key_that_occurs_twice_is_named(model, tmp_path):
    source = Noise(9)
    source.key = lambda index: f"{index % 8}.png"
    with pytest.raises(ValueError, match="images 0 and 8 of 'noise' have the same key '0.png'"):
        encode(tmp_path / "codes", source, model)
    assert not (tmp_path / "codes").exists()


def test_files_that_are_no_cache_are_left_alone(model, tmp_path):
    np.save(tmp_path / "shard-000000.npy", np.arange(3))
    (tmp_path / "shard-000001.npy.tmp").write_text("mine")
    with pytest.raises(ValueError, match="holds shard files but no cache.json"):
        encode(tmp_path, Noise(3), model)
    assert np.load(tmp_path / "shard-000000.npy").tolist() == [0, 1, 2] and (tmp_path / "shard-000001.npy.tmp").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be made a code cache"):
        encode(tmp_path / "file", Noise(3), model)
    with pytest.raises(ValueError, match=r"holds no code cache .*`evotok encode SOURCE -o"):
        CodeCache(tmp_path)


def test_numbers_out_of_range_are_refused():
    for values in ({"shard_size": 0}, {"batch_size": 0}, {"num_workers": -1}, {"max_bad_fraction": 2}):
        with pytest.raises(ValueError, match=next(iter(values))):
            EncodingOptions(**values)


# Broken images -----------------------------------------------------------------------------------------------


def test_broken_images_are_noted_and_not_tried_again(model, tmp_path):
    source = Noise(20, broken=(2, 9, 10, 11))
    cache = encode(tmp_path, source, model, max_bad_fraction=0.2)
    assert set(cache.broken) == {source.key(index) for index in (2, 9, 10, 11)} and len(cache) == 16
    assert cache.broken["noise/0009.png"] == "picture 9 is broken"
    assert cache.covers(source.key(index) for index in range(20))
    with pytest.raises(ValueError, match="it is broken: picture 9 is broken"):
        cache.codes("noise/0009.png")
    assert len((tmp_path / "broken.jsonl").read_text().splitlines()) == 4
    again = Noise(21)
    encode(tmp_path, again, model, max_bad_fraction=0.2)
    assert again.opened == [20]


def test_too_many_broken_images_stop_the_run_and_lose_nothing(model, tmp_path):
    source = Noise(40, broken=(8, 9))
    with pytest.raises(ValueError, match=r"2 of 40 samples are unusable, over the limit of 2.50%.*noise/0008.png"):
        encode(tmp_path, source, model, max_bad_fraction=0.025)
    assert len(source.opened) < 40  # that it is too many was clear before the end
    assert len(CodeCache(tmp_path)) == len(source.opened) - 2
    more = Noise(40, broken=(8, 9))
    cache = encode(tmp_path, more, model, max_bad_fraction=0.05)
    assert sorted(source.opened + more.opened) == list(range(40)) and len(cache) == 38


def test_mended_images_are_encoded_when_asked(model, tmp_path):
    encode(tmp_path, Noise(20, broken=(2, 9, 13)), model, max_bad_fraction=1.0)
    source = Noise(20, broken=(13,))
    cache = encode(tmp_path, source, model, max_bad_fraction=0.05, retry_broken=True)
    assert source.opened == [2, 9, 13] and list(cache.broken) == ["noise/0013.png"]
    assert mapping(cache).keys() == {source.key(index) for index in range(20) if index != 13}
    assert cache.codes("noise/0009.png").tolist() == expected(Noise(20), model)["noise/0009.png"][0]


def test_a_shard_of_broken_images_alone_is_a_shard(model, tmp_path):
    cache = encode(tmp_path, Noise(10, broken=(7, 8, 9)), model, max_bad_fraction=1.0)
    assert len(cache) == 7 and CodeCache(tmp_path).verify() == []


# The command -------------------------------------------------------------------------------------------------


def test_the_command_encodes_goes_on_and_verifies(scene_folder, tiny_evotok_folder, tmp_path, capsys):
    images, out = scene_folder / "train" / "images", tmp_path / "codes"
    flags = ["-o", str(out), "--model", str(tiny_evotok_folder), "--shard_size", "10", "--num_workers", "0"]
    assert main(["encode", str(images), *flags]) == 0
    assert f"{out}: 24 images, 9 x 8 codes each" in capsys.readouterr().out
    assert main(["encode", "--verify", "-o", str(out)]) == 0
    assert "all checksums are right" in capsys.readouterr().out
    shard = out / "shard-000001.npy"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x77")
    assert main(["encode", str(images), *flags, "--verify"]) == 2
    assert re.search("1 shards are not as they were written: shard-000001;", capsys.readouterr().err)
    assert main(["encode", *flags]) == 2
    assert "nothing to encode: name images" in capsys.readouterr().err


def test_a_cache_says_what_it_is(model, tmp_path):
    encode(tmp_path, Noise(3), model)
    assert json.loads((tmp_path / "cache.json").read_text()) == {
        "fingerprint": model.fingerprint(), "image_size": 48, "num_positions": 9, "num_quantizers": 8,
        "codebook_size": 32, "format": 2, "reader_version": READER_VERSION,
    }  # fmt: skip
