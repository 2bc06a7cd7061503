"""A code cache identifies images by their content, whatever their names and locations."""

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
from evotok_plugin.data.code_cache import CodeCache, EncodingOptions, encode_images
from evotok_plugin.data.code_cache import encode as encoding
from evotok_plugin.data.code_cache.ledger import Ledger
from evotok_plugin.data.code_cache.shards import Shard
from evotok_plugin.data.files import stamp_of
from evotok_plugin.data.keys import DigestIndex, key_digests
from evotok_plugin.data.sources import FileSource, open_source, open_sources
from evotok_plugin.errors import UserError
from evotok_plugin.evaluation.statistics_cache import StatisticsCache
from evotok_plugin.image_processing_evotok import EvoTokImageProcessor

SIZE = 48


@pytest.fixture(autouse=True)
def own_caches(tmp_path_factory, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    caplog.set_level(logging.INFO, "evotok_plugin.data")


def png(seed: int) -> bytes:
    """Noise that depends on the seed, in a file whose size does not."""
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
    """Check that image number n has the codes of the n-th seed."""
    for number, seed in enumerate(seeds):
        assert cache.codes(f"{number:02d}.bmp").tolist() == expected(model, png(seed)), number


@pytest.fixture
def counted(monkeypatch):
    """A function that returns the number of images encoded so far."""
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
    with pytest.raises(UserError, match=r"2 different images named '03.bmp', from several folders.*source=\.\.\."):
        both.codes("03.bmp")


def test_the_command_reports_both_folders(tiny_evotok_folder, tmp_path, capsys):
    flags = ["-o", str(tmp_path / "codes"), "--model", str(tiny_evotok_folder), "--num_workers", "0"]
    for folder, seeds, count in (("a", range(4), 4), ("b", range(2, 6), 8)):
        assert main(["encode", str(write(tmp_path / folder, seeds)), *flags, "--verify"]) == 0
        assert f": {count} images, 9 x 8 codes each\nall checksums match" in capsys.readouterr().out


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


def test_rows_of_two_datasets_keep_their_codes(model, tmp_path):
    datasets = pytest.importorskip("datasets")
    for name, seeds in (("a", range(3)), ("b", range(10, 13))):
        datasets.Dataset.from_dict({"image": [png(seed) for seed in seeds]}).save_to_disk(str(tmp_path / name))
    for name, seeds in (("a", range(3)), ("b", range(10, 13))):
        cache = encode(tmp_path / "codes", tmp_path / name, model)
        assert [cache.codes(f"{n:09d}").tolist() for n in range(3)] == [expected(model, png(seed)) for seed in seeds]


# Changed, moved, repaired ------------------------------------------------------------------------------------


def test_only_changed_images_are_reencoded(model, tmp_path, counted, caplog):
    folder, codes = write(tmp_path / "a", range(20)), tmp_path / "codes"
    encode(codes, folder, model)
    assert f"code cache {codes} contains 0 images, 0 of 20 from this source; 20 to read" in caplog.messages
    write(folder, [91, 92, 93], first=0)
    before = counted()
    cache = encode(codes, folder, model)
    assert counted() - before == 3
    assert f"code cache {codes} contains 20 images, 17 of 20 from this source; 3 to read" in caplog.messages
    assert "re-encoded 3 of 20 images whose content changed" in caplog.messages
    for opened in (cache, CodeCache(codes)):
        assert len(opened) == 20 == len(set(opened.keys()))
        assert_codes(opened, model, [91, 92, 93, *range(3, 20)])
    encode(codes, folder, model)
    assert f"code cache {codes} already contains all 20 images" in caplog.messages


def test_a_replacement_of_the_same_size_and_time_is_detected(model, tmp_path):
    folder = write(tmp_path / "a", range(3))
    encode(tmp_path / "codes", folder, model)
    facts = os.stat(folder / "01.bmp")
    (folder / "new.bmp").write_bytes(png(77))
    os.utime(folder / "new.bmp", ns=(facts.st_atime_ns, facts.st_mtime_ns))
    os.replace(folder / "new.bmp", folder / "01.bmp")
    assert_codes(encode(tmp_path / "codes", folder, model), model, [0, 77, 2])


def test_swapped_images_are_recognized(model, tmp_path, counted):
    folder = write(tmp_path / "a", range(4))
    encode(tmp_path / "codes", folder, model)
    write(folder, [1, 0])
    before = counted()
    assert_codes(encode(tmp_path / "codes", folder, model), model, [1, 0, 2, 3])
    assert_codes(CodeCache(tmp_path / "codes"), model, [1, 0, 2, 3])
    assert counted() == before


def test_touched_copied_and_moved_images_are_not_reencoded(model, tmp_path, counted, caplog):
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


def test_known_images_can_have_new_names(model, tmp_path, counted):
    folder = write(tmp_path / "data" / "a", range(4))
    encode(tmp_path / "codes", folder, model)
    before = counted()
    encode(tmp_path / "codes", tmp_path / "data", model)
    cache = CodeCache(tmp_path / "codes")
    assert counted() == before and len(cache) == 8
    assert cache.codes("a/02.bmp").tolist() == cache.codes("02.bmp").tolist() == expected(model, png(2))
    assert cache.size_of("a/02.bmp") == (50, 60) and cache.verify() == []


def test_repaired_images_are_encoded_and_other_broken_ones_not_retried(model, tmp_path, monkeypatch):
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
        with pytest.raises(UserError, match="'01.bmp'; it is broken"):
            cache.codes("01.bmp")
    os.remove(folder / "02.bmp")
    missing = FileSource(folder, ["00.bmp", "02.bmp"])
    assert "does not exist" in encode(codes, missing, model).broken["02.bmp"]


def test_known_images_are_encoded_after_their_codes_were_deleted(model, tmp_path, counted, caplog):
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


def test_identical_images_can_have_several_names(model, tmp_path):
    folder = write(tmp_path / "a", [1, 1, 2, 1])
    for _ in range(2):
        cache = encode(tmp_path / "codes", folder, model)
        assert len(cache) == 4
        assert_codes(cache, model, [1, 1, 2, 1])


def test_a_resumed_run_writes_the_files_of_an_uninterrupted_one(model, tmp_path):
    folder = write(tmp_path / "a", range(20))
    encode(tmp_path / "whole", folder, model)
    encode(tmp_path / "parts", FileSource(folder, [f"{n:02d}.bmp" for n in range(7)]), model)
    cache = encode(tmp_path / "parts", folder, model)
    names = [path.name for path in sorted((tmp_path / "whole").glob("shard-*"))]
    assert all((tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes() for name in names)
    assert len(names) == 6 and len(cache) == 20


# Verifying, older formats ------------------------------------------------------------------------------------


def test_verify_compares_the_images_themselves(model, tiny_evotok_folder, tmp_path, monkeypatch, capsys):
    """Changes are found even if the file system does not show them."""
    monkeypatch.setattr("evotok_plugin.data.sources.file_state", lambda path: (0,))
    folder, codes = write(tmp_path / "a", range(4)), tmp_path / "codes"
    flags = [str(folder), "-o", str(codes), "--model", str(tiny_evotok_folder), "--num_workers", "0", "--verify"]
    assert main(["encode", *flags]) == 0
    write(folder, [9], first=2)
    assert main(["encode", *flags]) == 2
    assert "1 images have changed since they were encoded" in (error := capsys.readouterr().err) and "'02.bmp'" in error


def test_a_cache_of_format_1_is_rejected(model, tmp_path):
    folder = write(tmp_path / "a", range(3))
    encode(tmp_path / "codes", folder, model)
    file = tmp_path / "codes" / "cache.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 1}))
    for attempt in (lambda: CodeCache(tmp_path / "codes"), lambda: encode(tmp_path / "codes", folder, model)):
        with pytest.raises(UserError, match="format 1, which identifies images by name only.*delete the folder"):
            attempt()


def test_a_cache_of_another_image_reader_is_rejected(model, tmp_path, monkeypatch):
    folder, codes = write(tmp_path / "a", range(3)), tmp_path / "codes"
    encode(codes, folder, model)
    file = codes / "cache.json"
    facts = json.loads(file.read_text())
    assert facts.pop("reader_version") == images.READER_VERSION
    statistics = StatisticsCache(tmp_path, open_source(folder), EvoTokImageProcessor(size=SIZE)).path
    monkeypatch.setattr(images, "READER_VERSION", 1)
    file.write_text(json.dumps(facts))  # like caches written before the version was stored
    assert len(CodeCache(codes)) == len(encode(codes, folder, model)) == 3
    monkeypatch.setattr(images, "READER_VERSION", 7)
    for attempt in (lambda: CodeCache(codes), lambda: encode(codes, folder, model)):
        with pytest.raises(UserError, match="version 1 of the image reader, this is version 7.*delete the folder"):
            attempt()
    assert encode(tmp_path / "new", folder, model).facts.reader_version == 7 and len(CodeCache(tmp_path / "new")) == 3
    assert StatisticsCache(tmp_path, open_source(folder), EvoTokImageProcessor(size=SIZE)).path != statistics


@pytest.mark.parametrize("field", ["stamps", "contents"])
def test_the_error_for_a_damaged_list_names_the_shard(model, tmp_path, field):
    encode(tmp_path / "codes", write(tmp_path / "a", range(3)), model)
    file = tmp_path / "codes" / "shard-000000.json"
    record = json.loads(file.read_text())
    for damaged in (record[field][:-1], ["not hexadecimal", *record[field][1:]]):
        file.write_text(json.dumps(record | {field: damaged}))
        with pytest.raises(UserError, match="shard-000000.json (is damaged|cannot be read)"):
            CodeCache(tmp_path / "codes")


def test_single_files_in_different_folders_have_distinct_codes(model, tmp_path, monkeypatch):
    """Their keys are relative paths, which name other files in another folder."""
    for name, seed in (("a", 1), ("b", 2)):
        monkeypatch.chdir(write(tmp_path / name, [seed]))
        assert_codes(encode(tmp_path / "codes", open_sources(["00.bmp"]), model), model, [seed])


def test_digests_that_end_in_zeros_are_found():
    digests = np.array([b"a" * 16, b"b" * 15 + b"\0", b"\0" * 16], "S16")
    index = DigestIndex(digests, np.arange(3))
    assert index.rows(digests).tolist() == [0, 1, 2] and index.rows(key_digests(["a"])).tolist() == [-1]


def test_opening_a_ledger_needs_little_temporary_memory(tmp_path):
    count, size = 40_000, 1_000
    for number in range(count // size):
        keys = [f"{number * size + index:09d}" for index in range(size)]
        stamps, contents = ([stamp_of(key, what).hex() for key in keys] for what in ("stamp", "content"))
        shard = Shard(keys=keys, sizes=[(640, 480)] * size, stamps=stamps, contents=contents)
        shard.write(tmp_path, number, np.zeros((size, 1, 1), np.uint16))
    Ledger(tmp_path)  # allocate what the first call keeps forever
    tracemalloc.start()
    try:
        ledger = Ledger(tmp_path)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(ledger.keys) == count and peak < 1.6 * kept < 1.6 * 100 * count
