"""Contents of a code cache, rejected caches, broken images and the command `evotok encode`."""

import json
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from encoding_runs import SIZE, Noise, encode, expected, mapping, open_files, options
from torch.utils.data import DataLoader

from evotok_plugin import EvoTokConfig, EvoTokModel
from evotok_plugin.cli import main
from evotok_plugin.data.code_cache import CodeCache, EncodingOptions, encode_images
from evotok_plugin.data.code_cache import cache as code_cache
from evotok_plugin.data.images import READER_VERSION
from evotok_plugin.errors import UserError

# Codes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
def test_codes_and_original_sizes_are_stored(model, tmp_path, num_workers):
    source = Noise(17)
    cache = encode(tmp_path, source, model, num_workers=num_workers)
    assert list(cache.keys()) == [source.key(index) for index in range(17)]
    assert mapping(cache) == expected(source, model)
    assert cache.codes("noise/0003.png").dtype == torch.int64 and cache.size_of("noise/0003.png") == (60, 53)
    assert "noise/0003.png" in cache and "noise/0017.png" not in cache
    assert cache.covers(cache.keys()) and not cache.covers(["noise/0003.png", "noise/0017.png"])
    with pytest.raises(UserError, match="does not contain image 'noise/0017.png'"):
        cache.codes("noise/0017.png")


def test_256_positions_and_16_levels_take_8_kib(tmp_path):
    config = EvoTokConfig.preset("tiny", image_size=256, num_quantizers=16, semantic_depth=16)
    encode_images(tmp_path, Noise(3), EvoTokModel(config).eval(), 256, options=options())
    (shard,) = tmp_path.glob("shard-*.npy")
    codes = np.load(shard, allow_pickle=False)
    assert codes.dtype == np.uint16 and codes.shape == (3, 256, 16)
    assert 0 <= shard.stat().st_size - 3 * 8192 <= 128


def test_files_are_synced_before_and_folders_after_the_rename(model, tmp_path, monkeypatch):
    events, rename = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda file: events.append(Path(os.readlink(f"/proc/self/fd/{file}"))))
    monkeypatch.setattr(os, "replace", lambda source, target: (events.append("rename"), rename(source, target)))
    encode(tmp_path, Noise(3), model)
    names = ("cache.json", "shard-000000.npy", "shard-000000.json")
    assert events == [event for name in names for event in (tmp_path / f".{name}.part", "rename", tmp_path)]


def test_files_left_by_a_killed_run_are_removed(model, tmp_path):
    encode(tmp_path, Noise(10), model)
    for name in ("shard-000010.npy", "shard-000010.json", "cache.json"):
        (tmp_path / f".{name}.part").write_bytes(b"half")
        (tmp_path / f"{name}.tmp").write_bytes(b"half")  # as earlier versions named them
    (tmp_path / "shard-000009.npy").write_bytes(b"half")
    for name in ("notes.tmp", ".notes.part"):
        (tmp_path / name).write_text("mine")
    encode(tmp_path, Noise(20), model)
    numbers = range(4)  # 7 and 3 images, then 7 and 3
    left = {f"shard-00000{number}.{suffix}" for number in numbers for suffix in ("npy", "json")}
    assert {path.name for path in tmp_path.iterdir()} == left | {"cache.json", ".lock", "notes.tmp", ".notes.part"}


def test_keys_can_be_any_file_name(model, tmp_path):
    source = Noise(4, prefix=os.fsdecode(b"caf\xe9/\xff \xc3\xa9 \"'"))  # bytes that are not valid UTF-8
    encode(tmp_path, source, model)
    assert mapping(CodeCache(tmp_path)) == expected(source, model)


def test_encoding_does_not_change_the_random_state(model, tmp_path):
    before = torch.get_rng_state()
    encode(tmp_path, Noise(4), model, num_workers=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_data_loading_processes_share_a_cache(model, tmp_path):
    source = Noise(20)
    cache = encode(tmp_path, source, model)
    keys = [source.key(index) for index in range(20)]
    alone = [cache.codes(key) for key in keys]  # so that its files are open when it is forked and pickled
    loader = DataLoader([*range(20)], collate_fn=lambda indices: cache.codes(keys[indices[0]]), num_workers=2)
    assert all(torch.equal(a, b) for a, b in zip(loader, alone, strict=True))
    copy = pickle.dumps(cache)
    assert len(copy) < 20 * 9 * 8  # without the codes
    assert torch.equal(pickle.loads(copy).codes(keys[5]), alone[5])


def test_the_number_of_open_files_is_limited(model, tmp_path, monkeypatch, rng):
    monkeypatch.setattr(code_cache, "_OPEN_SHARDS", 3)
    source = Noise(20)
    cache = encode(tmp_path, source, model, shard_size=2)
    wanted = expected(source, model)
    for index in rng.permutation(np.tile(np.arange(20), 3)):
        key = source.key(int(index))
        assert cache.codes(key).tolist() == wanted[key][0]
    assert len(open_files(tmp_path)) == 3


# Rejected caches ---------------------------------------------------------------------------------------------


def test_codes_of_another_tokenizer_or_size_are_rejected(model, tmp_path):
    encode(tmp_path, Noise(3), model)
    own = model.fingerprint()
    with pytest.raises(UserError, match=f"made by tokenizer {own[:12]} .* expected codes of tokenizer fedcba"):
        CodeCache(tmp_path, "fedcba9876543210")
    torch.manual_seed(1)
    other = EvoTokModel(model.config).eval()
    with pytest.raises(UserError, match=f"{own[:12]} .* {other.fingerprint()[:12]} .*choose another folder"):
        encode(tmp_path, Noise(4), other)
    with pytest.raises(UserError, match="images of 48 pixels, expected .* and 96 pixels"):
        encode_images(tmp_path, Noise(4), model, 96, options=options())
    assert len(CodeCache(tmp_path, own, SIZE)) == 3


@pytest.mark.parametrize("suffix", ["npy", "json"])
def test_a_truncated_file_is_reported_and_only_its_images_are_reencoded(model, tmp_path, suffix):
    source = Noise(20)
    encode(tmp_path, source, model)
    damaged = tmp_path / f"shard-000001.{suffix}"
    damaged.write_bytes(damaged.read_bytes()[:-10])
    for attempt in (lambda: CodeCache(tmp_path), lambda: encode(tmp_path, source, model)):
        with pytest.raises(UserError, match=f"shard-000001.{suffix}.* delete shard-000001.npy and shard-000001.json"):
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


def test_a_shard_that_was_restored_after_its_replacement_is_reported(model, tmp_path):
    encode(tmp_path, Noise(20), model)
    for suffix in ("npy", "json"):
        (tmp_path / f"shard-000009.{suffix}").write_bytes((tmp_path / f"shard-000001.{suffix}").read_bytes())
    with pytest.raises(UserError, match="shard-000001 and shard-000009 .* the same images; delete shard-000009.npy"):
        CodeCache(tmp_path)


def test_duplicate_keys_are_rejected(model, tmp_path):
    source = Noise(9)
    source.key = lambda index: f"{index % 8}.png"
    with pytest.raises(UserError, match="images 0 and 8 of 'noise' have the same key '0.png'"):
        encode(tmp_path / "codes", source, model)
    assert not (tmp_path / "codes").exists()


def test_folders_other_than_caches_are_not_changed(model, tmp_path):
    np.save(tmp_path / "shard-000000.npy", np.arange(3))
    (tmp_path / ".shard-000001.npy.part").write_text("mine")
    with pytest.raises(UserError, match="contains shard files but no cache.json"):
        encode(tmp_path, Noise(3), model)
    assert (
        np.load(tmp_path / "shard-000000.npy").tolist() == [0, 1, 2] and (tmp_path / ".shard-000001.npy.part").exists()
    )
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        encode(tmp_path / "file", Noise(3), model)
    with pytest.raises(UserError, match=r"is not a code cache .*`evotok encode SOURCE -o"):
        CodeCache(tmp_path)


def test_options_out_of_range_are_rejected():
    for values in ({"shard_size": 0}, {"batch_size": 0}, {"num_workers": -1}, {"max_bad_fraction": 2}):
        with pytest.raises(UserError, match=next(iter(values))):
            EncodingOptions(**values)


# Broken images -----------------------------------------------------------------------------------------------


def test_broken_images_are_recorded_and_not_retried(model, tmp_path):
    source = Noise(20, broken=(2, 9, 10, 11))
    cache = encode(tmp_path, source, model, max_bad_fraction=0.2)
    assert set(cache.broken) == {source.key(index) for index in (2, 9, 10, 11)} and len(cache) == 16
    assert cache.broken["noise/0009.png"] == "picture 9 is broken"
    assert cache.covers(source.key(index) for index in range(20))
    with pytest.raises(UserError, match="it is broken: picture 9 is broken"):
        cache.codes("noise/0009.png")
    assert len((tmp_path / "broken.jsonl").read_text().splitlines()) == 4
    again = Noise(21)
    encode(tmp_path, again, model, max_bad_fraction=0.2)
    assert again.opened == [20]


def test_too_many_broken_images_stop_the_run_without_losing_codes(model, tmp_path):
    source = Noise(40, broken=(8, 9))
    with pytest.raises(UserError, match=r"2 of 40 samples are unusable, over the limit of 2.50%.*noise/0008.png"):
        encode(tmp_path, source, model, max_bad_fraction=0.025)
    assert len(source.opened) < 40  # the limit was exceeded before the end
    assert len(CodeCache(tmp_path)) == len(source.opened) - 2
    more = Noise(40, broken=(8, 9))
    cache = encode(tmp_path, more, model, max_bad_fraction=0.05)
    assert sorted(source.opened + more.opened) == list(range(40)) and len(cache) == 38


def test_repaired_images_are_encoded_on_request(model, tmp_path):
    encode(tmp_path, Noise(20, broken=(2, 9, 13)), model, max_bad_fraction=1.0)
    source = Noise(20, broken=(13,))
    cache = encode(tmp_path, source, model, max_bad_fraction=0.05, retry_broken=True)
    assert source.opened == [2, 9, 13] and list(cache.broken) == ["noise/0013.png"]
    assert mapping(cache).keys() == {source.key(index) for index in range(20) if index != 13}
    assert cache.codes("noise/0009.png").tolist() == expected(Noise(20), model)["noise/0009.png"][0]


def test_a_shard_can_consist_of_broken_images(model, tmp_path):
    cache = encode(tmp_path, Noise(10, broken=(7, 8, 9)), model, max_bad_fraction=1.0)
    assert len(cache) == 7 and CodeCache(tmp_path).verify() == []


# The command -------------------------------------------------------------------------------------------------


def test_the_command_encodes_and_verifies(scene_folder, tiny_evotok_folder, tmp_path, capsys):
    images, out = scene_folder / "train" / "images", tmp_path / "codes"
    flags = ["-o", str(out), "--model", str(tiny_evotok_folder), "--shard_size", "10", "--num_workers", "0"]
    assert main(["encode", str(images), *flags]) == 0
    assert f"{out}: 24 images, 9 x 8 codes each" in capsys.readouterr().out
    assert main(["encode", "--verify", "-o", str(out)]) == 0
    assert "all checksums match" in capsys.readouterr().out
    shard = out / "shard-000001.npy"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x77")
    assert main(["encode", str(images), *flags, "--verify"]) == 2
    assert re.search("1 shards are damaged: shard-000001;", capsys.readouterr().err)
    assert main(["encode", *flags]) == 2
    assert "nothing to encode: name images" in capsys.readouterr().err


def test_cache_json_describes_the_codes(model, tmp_path):
    encode(tmp_path, Noise(3), model)
    assert json.loads((tmp_path / "cache.json").read_text()) == {
        "fingerprint": model.fingerprint(), "image_size": 48, "num_positions": 9, "num_quantizers": 8,
        "codebook_size": 32, "format": 2, "reader_version": READER_VERSION,
    }  # fmt: skip
