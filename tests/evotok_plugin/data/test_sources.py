import base64
import gzip
import io
import multiprocessing
import os
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image

from evotok_plugin.data.hf_datasets import DatasetSource
from evotok_plugin.data.keys import PackedStrings
from evotok_plugin.data.sources import is_held_out, open_source, open_sources, split_held_out
from evotok_plugin.data.tar_shards import TarSource, shard_index
from evotok_plugin.errors import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def photos(tmp_path, rng):
    """40 images of three classes, in ImageNet's layout."""
    for index in range(40):
        shape = (int(rng.integers(40, 90)), int(rng.integers(40, 90)), 3)
        folder = tmp_path / "photos" / f"class{index % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{index:02d}.png")
    return tmp_path / "photos"


def png(value, suffix="png"):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value, value, value)).save(buffer, suffix.replace("jpg", "jpeg"))
    return buffer.getvalue()


def write_shard(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_shards(folder, count=3, size=5):
    folder.mkdir(exist_ok=True)
    for shard in range(count):
        members = []
        for item in range(size):
            value = 10 * shard + item
            members += [
                (f"{item:04d}.txt", b"words"),
                (f"{item:04d}.png", png(value)),
                (f"{item:04d}.cls", b"%d" % item),
            ]
        write_shard(folder / f"part-{shard:03d}.tar", members)
    return folder


def values(source):
    return [source.picture(i).getpixel((0, 0))[0] for i in range(len(source))]


def same(picture, file):
    return np.array_equal(np.array(picture), np.array(Image.open(file)))


# Folders -----------------------------------------------------------------------------------------------------


def test_a_folder_has_relative_keys_and_labels(photos):
    source = open_source(photos)
    assert len(source) == 40
    assert [source.key(i) for i in range(40)] == sorted(p.relative_to(photos).as_posix() for p in photos.rglob("*.png"))
    assert source.label(0) == "class0" and source.label(39) == "class2"
    assert same(source.picture(0), photos / source.key(0))


def test_a_folder_that_links_to_itself_is_read_once(photos):
    (photos / "class0" / "again").symlink_to(photos)
    assert len(open_source(photos)) == 40


def test_single_files_have_their_paths_as_keys(photos):
    files = sorted(map(str, photos.rglob("*.png")))[:2]
    source = open_sources(files)
    assert [source.key(i) for i in range(2)] == files and same(source.picture(1), files[1])


def test_several_sources_are_concatenated_with_their_names_in_keys(photos, tmp_path):
    shards = write_shards(tmp_path / "shards", count=1)
    source = open_sources([photos, shards])
    assert len(source) == 45 and source.key(40) == f"{shards}/part-000/0000"
    assert source.picture(41).getpixel((0, 0))[0] == 1 and source.label(41) == "1"
    assert len({source.key(i) for i in range(45)}) == 45


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("absent", "'.*absent' does not exist"),
        ("empty", "contains no images"),
        ("absent-{000..002}.tar", "does not exist"),
    ],
)
def test_missing_sources_are_reported(tmp_path, spec, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        open_source(tmp_path / spec)


@pytest.mark.parametrize("spec", ["https://example.org/a.tar", "pipe:cat a.tar", "s3://bucket/a.tar"])
def test_remote_sources_are_rejected(spec):
    with pytest.raises(UserError, match="only local files are read"):
        open_source(spec)


def test_packed_strings_can_be_read_back():
    texts = ["", "a", "äöü/ß.png", "", "last"]
    packed = PackedStrings(texts)
    assert list(packed) == texts and packed[2] == texts[2]
    with pytest.raises(IndexError):
        packed[5]


# Shards ------------------------------------------------------------------------------------------------------


def test_shards_are_read_in_place_with_keys_and_labels(tmp_path):
    source = open_source(write_shards(tmp_path / "shards"))
    assert values(source) == [0, 1, 2, 3, 4, 10, 11, 12, 13, 14, 20, 21, 22, 23, 24]
    assert source.key(6) == "part-001/0001" and source.label(6) == "1"
    assert source.groups().tolist() == [0] * 5 + [1] * 5 + [2] * 5


def test_patterns_choose_shards(tmp_path):
    folder = write_shards(tmp_path / "shards")
    assert values(open_source(folder / "part-{000..001}.tar")) == [0, 1, 2, 3, 4, 10, 11, 12, 13, 14]
    assert len(open_source(folder / "part-00[12].tar")) == len(open_source(folder / "part-{001..002}.tar")) == 10


def test_one_image_per_sample_whatever_its_suffix_and_folder(tmp_path):
    members = [("a/x.seg.png", png(1)), ("a/x.jpg", png(2, "jpg")), ("b/x.JPG", png(3, "jpg")), ("b/y.json", b"{}")]
    source = open_source(write_shard(tmp_path / "s.tar", members))
    assert [source.key(i) for i in range(len(source))] == ["s/a/x", "s/b/x"] and source.label(0) is None
    assert values(source)[0] == 2  # x.jpg is the image, x.seg.png belongs to it


def test_other_processes_read_the_same_shards(tmp_path):
    source = open_source(write_shards(tmp_path / "shards"))
    expected = values(source)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(values, [source, source]) == [expected, expected]
    assert values(pickle.loads(pickle.dumps(source))) == expected == values(source)


def test_no_more_than_some_shards_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr("evotok_plugin.data.tar_shards._OPEN_SHARDS", 2)
    source = open_source(write_shards(tmp_path / "shards", count=4, size=2))
    assert values(source) == [0, 1, 10, 11, 20, 21, 30, 31] == values(source)
    assert len(source._open) == 2


def test_a_shard_is_scanned_once_and_again_when_it_changes(tmp_path, monkeypatch):
    path = str(write_shard(tmp_path / "s.tar", [("x.png", png(1))]))
    first = shard_index(path)
    with monkeypatch.context() as patch:
        patch.setattr("evotok_plugin.data.tar_shards._scan_shard", lambda shard: pytest.fail("scanned again"))
        assert shard_index(path) == first
    write_shard(tmp_path / "s.tar", [("x.png", png(1)), ("y.png", png(2))])
    assert shard_index(path)["keys"] == ["x", "y"]


def test_broken_shards_and_broken_images_are_distinguished(tmp_path):
    (tmp_path / "no.tar").write_bytes(b"not a tar file" * 100)
    with pytest.raises(UserError, match="no.tar' cannot be read as a tar file"):
        open_source(tmp_path / "no.tar")
    whole = write_shard(tmp_path / "whole.tar", [("x.png", png(1))])
    (tmp_path / "packed.tar").write_bytes(gzip.compress(whole.read_bytes()))
    with pytest.raises(UserError, match="compressed shards are not supported"):
        open_source(tmp_path / "packed.tar")
    source = open_source(write_shard(tmp_path / "half.tar", [("x.png", png(1)[:40]), ("y.png", png(2))]))
    with pytest.raises(UserError, match="image 'half/x' cannot be read"):
        source.picture(0)
    assert source.picture(1).getpixel((0, 0))[0] == 2


def test_a_shard_with_a_damaged_extended_header_is_rejected(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("x.png")
        member.pax_headers = {"GNU.sparse.map": "a,b", "GNU.sparse.size": "10"}
        archive.addfile(member)
    with pytest.raises(UserError, match="s.tar' cannot be read as a tar file"):
        open_source(tmp_path / "s.tar")


def test_a_deleted_shard_is_reported(tmp_path):
    path = write_shard(tmp_path / "s.tar", [("x.png", png(1))])
    source = TarSource([path], "s")
    path.unlink()
    with pytest.raises(UserError, match="s.tar' cannot be read"):
        source.picture(0)


# Datasets ----------------------------------------------------------------------------------------------------


@pytest.fixture
def dataset():
    datasets = pytest.importorskip("datasets")
    rows = {"image": [{"bytes": png(value), "path": None} for value in (5, 6, 7)], "label": [1, 0, 1]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    return datasets.Dataset.from_dict(rows, features)


def test_parquet_files_and_saved_datasets_are_read(tmp_path, dataset, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "parquet").mkdir()
    dataset.to_parquet(tmp_path / "parquet" / "train-0.parquet")
    dataset.save_to_disk(str(tmp_path / "saved"))
    for spec in ("parquet", "parquet/*.parquet", "saved"):
        source = open_source(tmp_path / spec)
        assert values(source) == [5, 6, 7] and source.key(2) == "000000002" and source.groups() is None
        assert [source.label(i) for i in range(3)] == ["dog", "cat", "dog"]


def test_a_column_of_bytes_is_accepted_and_a_missing_one_rejected(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"jpg": [png(9)], "text": ["x"]}).save_to_disk(str(tmp_path / "bytes"))
    assert values(open_source(tmp_path / "bytes")) == [9] and open_source(tmp_path / "bytes").label(0) is None
    datasets.Dataset.from_dict({"text": ["x"]}).save_to_disk(str(tmp_path / "text"))
    with pytest.raises(UserError, match="no image column; its columns are text"):
        open_source(tmp_path / "text")


def test_a_dataset_that_cannot_be_loaded_is_a_user_error(tmp_path):
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(UserError, match="cannot be read as parquet"):
        open_source(tmp_path / "broken.parquet")
    with pytest.raises(UserError, match="'hf:nobody/nothing' cannot be loaded"):
        open_source("hf:nobody/nothing")


def write_parquet(path, column):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"image": column}), path)
    return path


def test_structs_without_bytes_are_rejected_and_without_a_path_accepted(tmp_path):
    with pytest.raises(UserError, match="expected column 'image' to hold bytes, .* got structs of url"):
        open_source(write_parquet(tmp_path / "urls.parquet", [{"url": "x"}, {"url": "y"}]))
    source = open_source(write_parquet(tmp_path / "bytes.parquet", [{"bytes": png(4)}, {"bytes": None}]))
    assert source.picture(0).getpixel((0, 0)) == (4, 4, 4)
    with pytest.raises(UserError, match="image '000000001' .* is missing"):
        source.picture(1)


def test_a_damaged_string_in_a_dataset_is_a_broken_image(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    ends, text = np.array([0, 3, 3 + len("b.png")], np.int32), b"a\xff\xfe" + b"b.png"
    column = pyarrow.StringArray.from_buffers(2, *(pyarrow.py_buffer(part) for part in (ends.tobytes(), text)))
    source = open_source(write_parquet(tmp_path / "strings.parquet", column))
    with pytest.raises(UserError, match="row 0 cannot be read: 'utf-8' codec"):
        source.picture(0)
    assert len({source.stamp(0), source.stamp(1)}) == 2
    with pytest.raises(UserError, match="b.png' does not exist"):
        source.picture(1)


def test_parquet_names_only_images_of_its_folder(tmp_path):
    inside, outside = tmp_path / "data", tmp_path / "secret.png"
    inside.mkdir()
    save(inside / "a.png", 1)
    save(outside, 2)
    (inside / "link.png").symlink_to(outside)
    os.mkfifo(inside / "pipe.png")
    paths = ["a.png", str(inside / "a.png"), str(outside), "../secret.png", "link.png", "pipe.png", "/dev/zero"]
    source = open_source(write_parquet(inside / "paths.parquet", [{"bytes": None, "path": path} for path in paths]))
    assert [source.picture(index).getpixel((0, 0)) for index in (0, 1)] == [(1, 1, 1)] * 2
    for index in (2, 3, 4, 6):
        with pytest.raises(UserError, match="is outside of .*data; embed its bytes, or move it there"):
            source.picture(index)
        assert len(source.stamp(index)) == 16
    with pytest.raises(UserError, match="it is a folder, a pipe or a device, expected a file"):
        source.picture(5)


# Parts -------------------------------------------------------------------------------------------------------


def test_the_held_out_part_depends_only_on_keys(photos):
    source = open_source(photos)
    training, held = split_held_out(source, 0.3)
    keys = {held.key(i) for i in range(len(held))}
    assert 4 <= len(held) <= 20 and len(training) + len(held) == 40
    assert keys == {source.key(i) for i in range(40) if is_held_out(source.key(i), 0.3)}
    assert same(held.picture(0), photos / held.key(0)) and held.label(0).startswith("class")
    assert len(split_held_out(source, 0.0)[1]) == 0


def test_a_subset_of_shards_keeps_its_groups(tmp_path):
    source = open_source(write_shards(tmp_path / "shards"))
    training, held = split_held_out(source, 0.5)
    assert 0 < len(held) < 15
    for part in (training, held):
        assert part.groups().tolist() == [int(part.key(i)[5:8]) for i in range(len(part))]


# Files that are skipped, or must be named ---------------------------------------------------------------------


def keys(source):
    return [source.key(i) for i in range(len(source))]


def save(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(value))


def test_every_image_suffix_counts_and_hidden_files_do_not(tmp_path, caplog):
    for name in ("a.jpg", "b.TIF", "c.gif", "d.ppm", "e.JPG", "f.jfif"):
        Image.new("RGB", (8, 8)).save(tmp_path / name, {"f.jfif": "jpeg"}.get(name))
    for name in (".ipynb_checkpoints/a-checkpoint.jpg", "__MACOSX/a.jpg", "._a.jpg"):
        save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("")
    source = open_source(tmp_path)
    assert keys(source) == ["a.jpg", "b.TIF", "c.gif", "d.ppm", "e.JPG", "f.jfif"]
    assert [source.picture(i).size for i in range(6)] == [(8, 8)] * 6
    assert caplog.messages == [f"{tmp_path}: 1 file skipped: 1 .txt"]


def test_the_error_for_a_folder_without_images_lists_its_files(tmp_path):
    for name in ("a.tar.gz", "b.txt", "c.TXT"):
        (tmp_path / name).write_text("")
    with pytest.raises(UserError, match=r"contains no images .*; found 1 .tar.gz, 2 .txt"):
        open_source(tmp_path)


def test_a_pipe_among_images_is_skipped(photos, caplog):
    os.mkfifo(photos / "class0" / "pipe.png")
    assert len(open_source(photos)) == 40 and "1 special file" in caplog.text
    with pytest.raises(UserError, match="is a pipe or a device"):
        open_source(photos / "class0" / "pipe.png")


def test_a_folder_of_shards_and_images_is_rejected(tmp_path, caplog):
    shards = write_shards(tmp_path / "shards", count=2)
    (shards / "part-000.parquet").write_text("")  # as img2dataset writes them
    (shards / "part-000_stats.json").write_text("{}")
    assert len(open_source(shards)) == 10
    assert f"{shards}: 2 files skipped: 1 .json, 1 .parquet" in caplog.messages
    save(shards / "sub" / "a.png")
    with pytest.raises(UserError, match=r"several kinds of data \(1 .json, 1 .parquet, 1 .png, 2 .tar\).*\*.tar'"):
        open_source(shards)
    assert len(open_source(shards / "*.tar")) == 10


def test_shards_may_have_upper_case_suffixes(tmp_path):
    write_shard(tmp_path / "S.TAR", [("x.png", png(1))])
    assert keys(open_source(tmp_path)) == keys(open_source(tmp_path / "S.TAR")) == ["S/x"]


def test_names_with_dots_do_not_hide_images_of_a_shard(tmp_path, caplog):
    members = [("photo.v2.png", png(1)), ("photo.v3.png", png(2)), ("x.0.png", png(3)), ("x.1.jpg", png(4, "jpg"))]
    members += [("y.png", png(5)), ("y.jpg", png(6, "jpg")), ("y.cls", b"7"), ("./._z.png", b""), ("z.txt", b"")]
    source = open_source(write_shard(tmp_path / "s.tar", members))
    names = ["s/photo.v2", "s/photo.v3", "s/x.0", "s/x.1", "s/y.png", "s/y.jpg"]
    assert keys(source) == names and values(source) == [1, 2, 3, 4, 5, 6]
    assert [source.label(i) for i in (3, 4, 5)] == [None, "7", "7"]
    assert caplog.messages == [f"{tmp_path}/s.tar: 1 member skipped: 1 .txt"]


def test_a_shard_with_duplicate_names_is_rejected(tmp_path):
    with pytest.raises(UserError, match="s.tar' contains two files named 'x.png'"):
        open_source(write_shard(tmp_path / "s.tar", [("x.png", png(1)), ("x.png", png(2))]))


def test_shards_with_equal_names_in_two_folders_have_distinct_keys(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_shard(tmp_path / folder / "0.tar", [("x.png", png(1))])
    assert keys(open_source(tmp_path / "*" / "0.tar")) == ["a/0/x", "b/0/x"]


def test_hard_links_in_a_shard_are_read_and_other_links_are_reported(tmp_path, caplog):
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for name, kind in (("a.png", tarfile.REGTYPE), ("b.png", tarfile.LNKTYPE), ("c.png", tarfile.SYMTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "" if kind == tarfile.REGTYPE else "a.png"
            member.size = len(png(9)) if kind == tarfile.REGTYPE else 0
            archive.addfile(member, io.BytesIO(png(9)))
    source = open_source(tmp_path / "s.tar")
    assert keys(source) == ["s/a", "s/b"] and values(source) == [9, 9] and "1 link or device" in caplog.text


@pytest.mark.parametrize("name", ["a.tar.gz", "a.zip", "a.json", "a.txt.gz"])
def test_files_other_than_images_are_rejected(tmp_path, name):
    (tmp_path / name).write_text("")
    with pytest.raises(UserError, match="unpack it first|expected images"):
        open_source(tmp_path / name)


def test_the_error_for_a_dataset_with_several_splits_lists_them(tmp_path):
    datasets = pytest.importorskip("datasets")
    split = datasets.Dataset.from_dict({"image": [png(1)]})
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(str(tmp_path / "both"))
    with pytest.raises(UserError, match=r"several splits of a dataset \(test, train\); name one"):
        open_source(tmp_path / "both")


# Stamps ------------------------------------------------------------------------------------------------------


def test_stamps_change_with_the_content_of_files_shards_and_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")

    def write(value):
        save(tmp_path / "files" / "x.png", value)
        write_shard(tmp_path / "s.tar", [("x.png", png(value))])
        datasets.Dataset.from_dict({"image": [png(value)]}).save_to_disk(str(tmp_path / f"rows{value}"))
        return [open_source(tmp_path / name) for name in ("files", "s.tar", f"rows{value}")]

    before = [(source.stamp(0), source.content(0)) for source in write(1)]
    after = [(source.stamp(0), source.content(0)) for source in write(2)]
    assert [content for _, content in before] == [png(1)] * 3 and [content for _, content in after] == [png(2)] * 3
    assert all(one != two for (one, _), (two, _) in zip(before, after, strict=True))
    again = [open_source(tmp_path / name) for name in ("files", "s.tar", "rows2")]
    assert [source.stamp(0) for source in again] == [stamp for stamp, _ in after]


def test_a_dataset_of_paths_reflects_changes_of_its_files(tmp_path):
    datasets = pytest.importorskip("datasets")
    save(tmp_path / "x.png", 1)
    paths = {"image": [{"bytes": None, "path": str(tmp_path / "x.png")}]}
    dataset = datasets.Dataset.from_dict(paths, datasets.Features({"image": datasets.Image()}))
    source = DatasetSource(dataset, "paths")
    stamp = source.stamp(0)
    save(tmp_path / "x.png", 2)
    assert values(source) == [2] and source.stamp(0) != stamp


def test_a_dataset_of_strings_contains_or_names_its_images(tmp_path):
    datasets = pytest.importorskip("datasets")
    texts = [base64.b64encode(png(value)).decode() for value in (1, 2)]
    save(tmp_path / "x#y.png", 3)
    strings = [texts[0], f"DATA:;base64,{texts[1]}", f"file://{tmp_path}/x#y.png", str(tmp_path / "x#y.png")]
    plain = DatasetSource(datasets.Dataset.from_dict({"image": strings}), "strings")
    features = datasets.Features({"image": datasets.Image()})
    rows = [{"bytes": None, "path": text} for text in strings]
    cast = DatasetSource(datasets.Dataset.from_dict({"image": rows}, features), "strings")
    for source in (plain, cast):
        assert values(source) == [1, 2, 3, 3] and source.content(0) == png(1)
        before = [source.stamp(row) for row in range(4)]
        assert len(set(before)) == 4
    more = DatasetSource(datasets.Dataset.from_dict({"image": [texts[0], texts[0]]}), "strings")
    assert more.stamp(0) == plain.stamp(0) and more.stamp(1) != plain.stamp(1)
    save(tmp_path / "x#y.png", 4)
    assert values(plain)[2:] == [4, 4]
    after = [cast.stamp(row) for row in range(4)]
    assert after[:2] == before[:2] and after[2] != before[2] and after[3] != before[3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("https://example.org/a.png", r"strings row 0 \('https://.*URLs are not fetched"),
        ("data:image/png;base64,AAAAA", "strings row 0 .* base64 content is broken"),
        ("data:image/png;base64," + "A" * 100_001, "base64 content is broken"),
        ("a" * 100_000, "cannot be read: File name too long"),
    ],
)
def test_the_error_for_a_string_without_an_image_names_its_row(text, message):
    datasets = pytest.importorskip("datasets")
    source = DatasetSource(datasets.Dataset.from_dict({"image": [text]}), "strings")
    assert len(source.stamp(0)) == 16
    with pytest.raises(UserError, match=message) as caught:
        source.picture(0)
    assert len(str(caught.value)) < 400
