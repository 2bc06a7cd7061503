"""A code cache gives an image the codes of its own content, whatever its name and wherever it lies."""

import io
import json
import logging
import os
import shutil
import tarfile
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from evotok_plugin.cli import main
from evotok_plugin.data import images
from evotok_plugin.data.code_cache import encode as encoding
from evotok_plugin.data.code_cache.cache import CodeCache
from evotok_plugin.data.code_cache.encode import EncodingOptions, encode_images
from evotok_plugin.data.code_cache.ledger import Ledger
from evotok_plugin.data.code_cache.shards import Shard
from evotok_plugin.data.files import stamp_of
from evotok_plugin.data.keys import DigestIndex, key_digests
from evotok_plugin.data.sources import FileSource, open_source, open_sources
from evotok_plugin.image_processing_evotok import EvoTokImageProcessor
from evotok_plugin.metrics.inception import StatisticsCache
from evotok_plugin.tokenizer_folder import open_tokenizer

SIZE = 48


@pytest.fixture(scope="module")
def model(tiny_evotok_folder):
    return open_tokenizer(str(tiny_evotok_folder), "cpu")[0]


@pytest.fixture(autouse=True)
def own_caches(tmp_path_factory, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    caplog.set_level(logging.INFO, "evotok_plugin.data")


def png(seed: int) -> bytes:
    """Noise of its own, in as many bytes for every seed."""
    content = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (60, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(content, "bmp")
    return content.getvalue()


def write(folder, seeds, first=0):
    folder.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds, first):
        (folder / f"{number:02d}.bmp").write_bytes(png(seed))
    return folder


def encode(folder, source, model, **options) -> CodeCache:
    source = source if hasattr(source, "key") else open_source(source)
    defaults = {"shard_size": 7, "batch_size": 3, "num_workers": 0, "show_progress": False, "max_bad_fraction": 1.0}
    return encode_images(folder, source, model, SIZE, options=EncodingOptions(**defaults | options))


def expected(model, content: bytes) -> list:
    pixels = EvoTokImageProcessor(size=SIZE)(Image.open(io.BytesIO(content))).pixel_values
    return model.encode(pixels).codes[0].tolist()


def assert_codes(cache: CodeCache, model, seeds) -> None:
    """The images of this number order have the codes of these seeds, in the cache of their folder."""
    for number, seed in enumerate(seeds):
        assert cache.codes(f"{number:02d}.bmp").tolist() == expected(model, png(seed)), number


@pytest.fixture
def counted(monkeypatch):
    """How many images have been encoded for a cache."""
    seen, encode = [], encoding.codes_of
    monkeypatch.setattr(encoding, "codes_of", lambda pixels, model: seen.append(len(pixels)) or encode(pixels, model))
    return lambda: sum(seen)


# Equal names -------------------------------------------------------------------------------------------------


def test_two_folders_with_equal_names_keep_their_codes(model, tmp_path):
    a, b, codes = write(tmp_path / "a", range(10)), write(tmp_path / "b", range(50, 60)), tmp_path / "codes"
    assert_codes(encode(codes, a, model), model, range(10))
    assert_codes(encode(codes, b, model), model, range(50, 60))
    assert_codes(encode(codes, a, model), model, range(10))
    assert_codes(CodeCache(codes, source=open_source(b)), model, range(50, 60))
    both = CodeCache(codes)
    assert len(both) == 20 and sorted(both.keys()) == sorted([f"{n:02d}.bmp" for n in range(10)] * 2)
    assert "03.bmp" in both and both.covers(["03.bmp"]) and both.verify() == []
    with pytest.raises(ValueError, match=r"2 different images of the name '03.bmp', of several folders.*source=\.\.\."):
        both.codes("03.bmp")


def test_the_command_reports_both_folders(tiny_evotok_folder, tmp_path, capsys):
    flags = ["-o", str(tmp_path / "codes"), "--model", str(tiny_evotok_folder), "--num_workers", "0"]
    for folder, seeds, count in (("a", range(4), 4), ("b", range(2, 6), 8)):
        assert main(["encode", str(write(tmp_path / folder, seeds)), *flags, "--verify"]) == 0
        assert f": {count} images, 9 x 8 codes each\nall checksums are right" in capsys.readouterr().out


def test_shards_of_equal_names_keep_their_codes(model, tmp_path):
    for folder, seeds in (("a", range(3)), ("b", range(10, 13))):
        (tmp_path / folder).mkdir()
        with tarfile.open(tmp_path / folder / "0.tar", "w") as archive:
            for number, seed in enumerate(seeds):
                member = tarfile.TarInfo(f"{number}.bmp")
                member.size = len(png(seed))
                archive.addfile(member, io.BytesIO(png(seed)))
    for folder, seeds in (("a", range(3)), ("b", range(10, 13))):
        cache = encode(tmp_path / "codes", tmp_path / folder / "0.tar", model)
        assert [cache.codes(f"0/{n}").tolist() for n in range(3)] == [expected(model, png(seed)) for seed in seeds]


def test_rows_of_two_data_sets_keep_their_codes(model, tmp_path):
    datasets = pytest.importorskip("datasets")
    for name, seeds in (("a", range(3)), ("b", range(10, 13))):
        datasets.Dataset.from_dict({"image": [png(seed) for seed in seeds]}).save_to_disk(str(tmp_path / name))
    for name, seeds in (("a", range(3)), ("b", range(10, 13))):
        cache = encode(tmp_path / "codes", tmp_path / name, model)
        assert [cache.codes(f"{n:09d}").tolist() for n in range(3)] == [expected(model, png(seed)) for seed in seeds]


# Changed, moved, repaired ------------------------------------------------------------------------------------


def test_only_changed_images_are_encoded_again(model, tmp_path, counted, caplog):
    folder = write(tmp_path / "a", range(20))
    encode(tmp_path / "codes", folder, model)
    assert f"code cache {tmp_path / 'codes'}: holds 0 images, 0 of 20 of this source; 20 to look at" in caplog.messages
    write(folder, [91, 92, 93], first=0)
    before = counted()
    cache = encode(tmp_path / "codes", folder, model)
    assert counted() - before == 3
    assert f"code cache {tmp_path / 'codes'}: holds 20 images, 17 of 20 of this source; 3 to look at" in caplog.messages
    assert "re-encoded 3 of 20 images whose content changed" in caplog.messages
    for opened in (cache, CodeCache(tmp_path / "codes")):
        assert len(opened) == 20 == len(set(opened.keys()))
        assert_codes(opened, model, [91, 92, 93, *range(3, 20)])
    encode(tmp_path / "codes", folder, model)
    assert f"code cache {tmp_path / 'codes'} holds all 20 images already" in caplog.messages


def test_a_replacement_of_the_same_size_and_time_is_noticed(model, tmp_path):
    folder = write(tmp_path / "a", range(3))
    encode(tmp_path / "codes", folder, model)
    facts = os.stat(folder / "01.bmp")
    (folder / "new.bmp").write_bytes(png(77))
    os.utime(folder / "new.bmp", ns=(facts.st_atime_ns, facts.st_mtime_ns))
    os.replace(folder / "new.bmp", folder / "01.bmp")
    assert_codes(encode(tmp_path / "codes", folder, model), model, [0, 77, 2])


def test_swapped_images_are_recognized_and_swapped(model, tmp_path, counted):
    folder = write(tmp_path / "a", range(4))
    encode(tmp_path / "codes", folder, model)
    write(folder, [1, 0])
    before = counted()
    assert_codes(encode(tmp_path / "codes", folder, model), model, [1, 0, 2, 3])
    assert_codes(CodeCache(tmp_path / "codes"), model, [1, 0, 2, 3])
    assert counted() == before


def test_touched_copied_and_moved_images_are_not_encoded_again(model, tmp_path, counted, caplog):
    folder, codes = write(tmp_path / "a", range(10)), tmp_path / "codes"
    encode(codes, folder, model)
    before = counted()
    for file in folder.iterdir():
        os.utime(file, (1, 1))
    assert_codes(encode(codes, folder, model), model, range(10))
    assert "recognized 10 of 10 images by their content" in caplog.messages
    shutil.copytree(folder, tmp_path / "copied")
    folder.rename(tmp_path / "moved")
    for name in ("copied", "moved"):
        assert_codes(encode(codes, tmp_path / name, model), model, range(10))
    assert counted() == before and len(CodeCache(codes)) == 10
    assert_codes(CodeCache(codes), model, range(10))
    assert not any("whose content changed" in message for message in caplog.messages)


def test_other_names_for_known_images_are_names_in_the_cache(model, tmp_path, counted):
    folder = write(tmp_path / "data" / "a", range(4))
    encode(tmp_path / "codes", folder, model)
    before = counted()
    encode(tmp_path / "codes", tmp_path / "data", model)
    cache = CodeCache(tmp_path / "codes")
    assert counted() == before and len(cache) == 8
    assert cache.codes("a/02.bmp").tolist() == cache.codes("02.bmp").tolist() == expected(model, png(2))
    assert cache.size_of("a/02.bmp") == (50, 60) and cache.verify() == []


def test_repaired_images_are_noticed_and_others_not_tried_again(model, tmp_path, monkeypatch):
    folder, codes = write(tmp_path / "a", range(5)), tmp_path / "codes"
    for name in ("01.bmp", "03.bmp"):
        (folder / name).write_bytes(b"not an image")
    assert set(encode(codes, folder, model).broken) == {"01.bmp", "03.bmp"}
    write(folder, [1], first=1)
    read, content = [], FileSource.content
    monkeypatch.setattr(FileSource, "content", lambda self, i: read.append(self.key(i)) or content(self, i))
    for cache in (encode(codes, folder, model), CodeCache(codes)):
        assert list(cache.broken) == ["03.bmp"] and len(cache) == 4
        assert cache.codes("01.bmp").tolist() == expected(model, png(1))
    assert read == ["01.bmp"]
    encode(codes, folder, model, retry_broken=True)
    assert read == ["01.bmp", "03.bmp"]


def test_an_image_that_breaks_loses_its_codes(model, tmp_path):
    folder, codes = write(tmp_path / "a", range(3)), tmp_path / "codes"
    encode(codes, folder, model)
    (folder / "01.bmp").write_bytes(b"not an image")
    for cache in (encode(codes, folder, model), CodeCache(codes)):
        assert list(cache.broken) == ["01.bmp"] and len(cache) == 2
        with pytest.raises(ValueError, match="'01.bmp'; it is broken"):
            cache.codes("01.bmp")
    os.remove(folder / "02.bmp")
    missing = FileSource(folder, ["00.bmp", "02.bmp"])
    assert "does not exist" in encode(codes, missing, model).broken["02.bmp"]


def test_known_images_whose_codes_are_deleted_are_encoded(model, tmp_path, counted, caplog):
    folder, codes = write(tmp_path / "a", range(7)), tmp_path / "codes"
    encode(codes, folder, model)
    folder.rename(tmp_path / "b")
    encode(codes, tmp_path / "b", model)
    for suffix in ("npy", "json"):
        (codes / f"shard-000000.{suffix}").unlink()
    before = counted()
    assert_codes(encode(codes, tmp_path / "b", model), model, range(7))
    assert counted() - before == 7 and not any("content changed" in message for message in caplog.messages)
    assert_codes(CodeCache(codes), model, range(7))


def test_images_with_one_content_may_have_several_names(model, tmp_path):
    folder = write(tmp_path / "a", [1, 1, 2, 1])
    for _ in range(2):
        cache = encode(tmp_path / "codes", folder, model)
        assert len(cache) == 4
        assert_codes(cache, model, [1, 1, 2, 1])


def test_a_resumed_run_and_an_uninterrupted_one_hold_the_same(model, tmp_path):
    folder = write(tmp_path / "a", range(20))
    encode(tmp_path / "whole", folder, model)
    encode(tmp_path / "parts", FileSource(folder, [f"{n:02d}.bmp" for n in range(7)]), model)
    cache = encode(tmp_path / "parts", folder, model)
    names = [path.name for path in sorted((tmp_path / "whole").glob("shard-*"))]
    assert all((tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes() for name in names)
    assert len(names) == 6 and len(cache) == 20


# Verifying, older formats ------------------------------------------------------------------------------------


def test_verify_compares_the_images_themselves(model, tiny_evotok_folder, tmp_path, monkeypatch, capsys):
    """Even where a file system shows no sign of a change."""
    monkeypatch.setattr("evotok_plugin.data.sources.file_state", lambda path: (0,))
    folder, codes = write(tmp_path / "a", range(4)), tmp_path / "codes"
    flags = [str(folder), "-o", str(codes), "--model", str(tiny_evotok_folder), "--num_workers", "0", "--verify"]
    assert main(["encode", *flags]) == 0
    write(folder, [9], first=2)
    assert main(["encode", *flags]) == 2
    assert "1 images are not the ones that were encoded" in (told := capsys.readouterr().err) and "'02.bmp'" in told


def test_a_cache_of_names_alone_is_refused_with_the_remedy(model, tmp_path):
    folder = write(tmp_path / "a", range(3))
    encode(tmp_path / "codes", folder, model)
    file = tmp_path / "codes" / "cache.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 1}))
    for attempt in (lambda: CodeCache(tmp_path / "codes"), lambda: encode(tmp_path / "codes", folder, model)):
        with pytest.raises(
            ValueError, match="format 1, which identifies images by their names alone.*delete the folder"
        ):
            attempt()


def test_a_cache_of_another_image_reader_is_rejected_with_both_versions(model, tmp_path, monkeypatch):
    folder, codes = write(tmp_path / "a", range(3)), tmp_path / "codes"
    encode(codes, folder, model)
    file = codes / "cache.json"
    facts = json.loads(file.read_text())
    assert facts.pop("reader_version") == images.READER_VERSION
    statistics = StatisticsCache(tmp_path, open_source(folder), EvoTokImageProcessor(size=SIZE)).path
    monkeypatch.setattr(images, "READER_VERSION", 1)
    file.write_text(json.dumps(facts))  # as it was before the version was stored
    assert len(CodeCache(codes)) == len(encode(codes, folder, model)) == 3
    monkeypatch.setattr(images, "READER_VERSION", 7)
    for attempt in (lambda: CodeCache(codes), lambda: encode(codes, folder, model)):
        with pytest.raises(ValueError, match="version 1 of the image reader, this is version 7.*delete the folder"):
            attempt()
    assert encode(tmp_path / "new", folder, model).facts.reader_version == 7 and len(CodeCache(tmp_path / "new")) == 3
    assert StatisticsCache(tmp_path, open_source(folder), EvoTokImageProcessor(size=SIZE)).path != statistics


@pytest.mark.parametrize("field", ["stamps", "contents"])
def test_a_damaged_list_names_the_shard(model, tmp_path, field):
    encode(tmp_path / "codes", write(tmp_path / "a", range(3)), model)
    file = tmp_path / "codes" / "shard-000000.json"
    record = json.loads(file.read_text())
    for damaged in (record[field][:-1], ["no hexadecimal", *record[field][1:]]):
        file.write_text(json.dumps(record | {field: damaged}))
        with pytest.raises(ValueError, match="shard-000000.json is not what was written"):
            CodeCache(tmp_path / "codes")


def test_single_files_from_anywhere_have_their_own_codes(model, tmp_path, monkeypatch):
    """Their keys are paths as they were written, which may mean other files in another folder."""
    for name, seed in (("a", 1), ("b", 2)):
        monkeypatch.chdir(write(tmp_path / name, [seed]))
        assert_codes(encode(tmp_path / "codes", open_sources(["00.bmp"]), model), model, [seed])


def test_digests_that_end_in_zeros_are_found():
    digests = np.array([b"a" * 16, b"b" * 15 + b"\0", b"\0" * 16], "S16")
    index = DigestIndex(digests, np.arange(3))
    assert index.rows(digests).tolist() == [0, 1, 2] and index.rows(key_digests(["a"])).tolist() == [-1]


def test_opening_a_ledger_takes_little_more_memory_than_it_keeps(tmp_path):
    count, size = 40_000, 1_000
    for number in range(count // size):
        keys = [f"{number * size + index:09d}" for index in range(size)]
        stamps, contents = ([stamp_of(key, what).hex() for key in keys] for what in ("stamp", "content"))
        shard = Shard(keys=keys, sizes=[(640, 480)] * size, stamps=stamps, contents=contents)
        shard.write(tmp_path, number, np.zeros((size, 1, 1), np.uint16))
    Ledger(tmp_path)  # whatever is kept from the first call on
    tracemalloc.start()
    try:
        ledger = Ledger(tmp_path)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(ledger.keys) == count and peak < 1.6 * kept < 1.6 * 100 * count
