"""Records from files of every kind: the same rows, whatever they are kept in."""

import json
import multiprocessing

import pytest
from record_files import (
    ROWS,
    as_dataset,
    as_hub,
    as_json,
    as_jsonl,
    as_parquet,
    as_saved,
    as_shards,
    one_record,
    png,
    turns,
    write_shard,
)

from evotok_plugin.errors import UserError
from llava_ext.data.record_sources import open_records
from llava_ext.data.records import RowOptions, parse_record


@pytest.fixture(autouse=True)
def own_caches(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


@pytest.fixture
def folder(tmp_path):
    for number in range(12):
        (tmp_path / f"{number:02d}.png").write_bytes(png(number))
    return tmp_path


every_form = pytest.mark.parametrize("write", [as_json, as_jsonl, as_shards, as_parquet, as_saved, as_hub])


# Every format gives the same records ----------------------------------------------------------------------------


@every_form
def test_rows_and_images_are_read_in_order(folder, write):
    source = open_records(write(folder, ROWS), RowOptions(folder))
    assert len(source) == 12
    keys = []
    for number, expected in enumerate(ROWS):
        record, plain = one_record(source, number), parse_record(expected, folder)
        assert (record.id, record.messages, record.drawn) == (plain.id, plain.messages, plain.drawn)
        for which, key in enumerate(record.images):
            assert source.picture(number, which).getpixel((0, 0)) == (number,) * 3
            keys.append(key)
    assert len(set(keys)) == 8 and len({source.row_name(number) for number in range(12)}) == 12


@every_form
def test_other_processes_read_the_same(folder, write):
    source = open_records(write(folder, ROWS), RowOptions(folder))
    expected = [one_record(source, number) for number in range(12)]
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(_all_records, [source]) == expected == _all_records(source)


def _all_records(source):
    return [one_record(source, number) for number in range(len(source))]


def test_several_images_and_parts_in_a_data_set(folder):
    import datasets

    content = [{"type": "image", "text": None}, {"type": "image", "text": None}, {"type": "text", "text": "what?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": [{"type": "text", "text": "a"}]}]
    stored = [{"messages": messages, "images": [{"bytes": png(v), "path": None} for v in (3, 4)]}]
    datasets.Dataset.from_list(stored).save_to_disk(str(folder / "several"))
    source = open_records(folder / "several", RowOptions())
    assert one_record(source, 0).drawn == (False, False)
    assert [source.picture(0, which).getpixel((0, 0))[0] for which in (0, 1)] == [3, 4]


def test_columns_of_bytes_and_of_paths(folder):
    import datasets

    for name, image in (("bytes", png(5)), ("paths", "05.png")):
        rows = [{"conversations": turns("<image>", "a"), "image": image}]
        datasets.Dataset.from_list(rows).save_to_disk(str(folder / name))
        source = open_records(folder / name, RowOptions(folder))
        assert len(one_record(source, 0).images) == 1 and source.picture(0, 0).getpixel((0, 0)) == (5, 5, 5)


@pytest.mark.parametrize("write", [as_parquet, as_saved])
def test_an_empty_column_of_images_counts_as_absent(folder, write):
    import datasets

    plain = as_dataset(folder, [one for one in ROWS if "image" in one], embed=write is as_parquet)
    both = plain.add_column("images", [[] for _ in range(len(plain))])
    both.save_to_disk(str(folder / "both"))
    source = open_records(folder / "both", RowOptions(folder))
    assert [source.picture(n, 0).getpixel((0, 0))[0] for n in range(8)] == [0, 1, 3, 4, 6, 7, 9, 10]
    filled = plain.add_column("images", [["00.png"] for _ in range(len(plain))])
    source = _records_of(filled, folder / "filled", folder)
    with pytest.raises(UserError, match="'images' and 'image' hold different images"):
        source.records(3)
    videos = datasets.Dataset.from_list([{"conversations": turns("a", "b"), "video": name} for name in ("v.mp4", None)])
    source = _records_of(videos, folder / "videos", folder)
    assert len(source.records(1)) == 1
    with pytest.raises(UserError, match="the row has 'video'; only text and images"):
        source.records(0)


def _records_of(dataset, where, folder):
    dataset.save_to_disk(str(where))
    return open_records(where, RowOptions(folder))


@pytest.mark.parametrize("dotted", [False, True])
def test_names_with_dots_are_separate_samples(folder, dotted, caplog):
    names = ["photo.v1", "photo.v2"] + ["photo"] * dotted
    members = [(f"{name}.png", png(value)) for value, name in enumerate(names)]
    members += [(f"{name}.json", json.dumps({"conversations": turns("<image>", name)}).encode()) for name in names]
    members += [("photo.v1.cls", b"0"), ("__MACOSX/._photo.png", b"")]
    source = open_records(write_shard(folder / "w.TAR", members), RowOptions())
    assert len(source) == len(names) and "1 member skipped: 1 .cls" in caplog.text
    for index in range(len(names)):
        record = one_record(source, index)
        name = record.messages[1]["content"]
        assert source.picture(index, 0).getpixel((0, 0))[0] == names.index(name) and len(record.images) == 1


def test_a_video_in_a_shard_is_a_bad_sample(folder):
    members = [("a.mp4", b""), ("a.txt", b"a ring"), ("b.png", png(1)), ("b.TXT", b"a ring")]
    source = open_records(write_shard(folder / "w.tar", members), RowOptions(caption_task="read"))
    assert source.records(1)[0].kind == "read"
    with pytest.raises(UserError, match="the sample has a .mp4 file; only text and images"):
        source.records(0)


@every_form
def test_stamps_and_contents_belong_to_the_images(folder, write):
    source = open_records(write(folder, ROWS), RowOptions(folder))
    seen = {}
    for number, expected in enumerate(ROWS):
        record = one_record(source, number)
        assert len(record.stamps) == len(record.images) == ("image" in expected)
        for which, stamp in enumerate(record.stamps):
            assert source.content(number, which) == png(number) and len(stamp) == 16
            seen[stamp] = number
    assert len(seen) == 8


def test_images_of_a_sample_are_ordered_by_number(folder):
    images = [(f"x.{number}.png", png(number)) for number in (10, 0, 2)]
    note = ("x.json", json.dumps({"conversations": turns("<image>" * 3, "a")}).encode())
    source = open_records(write_shard(folder / "w.tar", [*images, note]), RowOptions())
    assert [key.rpartition("/")[2] for key in one_record(source, 0).images] == ["x.0.png", "x.2.png", "x.10.png"]
    assert [source.picture(0, which).getpixel((0, 0))[0] for which in range(3)] == [0, 2, 10]


@pytest.mark.parametrize("note", [[], [("x.json", json.dumps({"url": "u", "width": 8}).encode())]])
def test_captions_of_a_shard_are_described_and_drawn(folder, note):
    """As written by img2dataset: the .json, if present, holds only metadata."""
    shard = write_shard(folder / "w.tar", [("x.png", png(1)), ("x.txt", b"a ring\n"), *note])
    records = open_records(shard, RowOptions()).records(0)
    assert [record.kind for record in records] == ["read", "draw"] and records[0].images == records[1].images
    (record,) = open_records(shard, RowOptions(caption_task="draw")).records(0)
    assert [message["content"] for message in record.messages] == ["a ring", "<image>"]


# Keys of images ----------------------------------------------------------------------------------------------


def test_shards_with_the_same_name_have_distinct_image_keys(tmp_path):
    """Otherwise a cache shared by two data sets would return the codes of the wrong image."""
    keys = set()
    for value in (1, 2):
        (tmp_path / str(value)).mkdir()
        members = [("x.png", png(value)), ("x.txt", b"a ring")]
        source = open_records(write_shard(tmp_path / str(value) / "0.tar", members), RowOptions(caption_task="read"))
        keys.update(one_record(source, 0).images)
    assert len(keys) == 2


@pytest.mark.parametrize("write", [as_shards, as_parquet])
def test_keys_stay_the_same_when_files_are_moved_or_added(folder, write, tmp_path_factory):
    def names(where):
        source = open_records(where, RowOptions())
        return [key for number in range(len(source)) for record in source.records(number) for key in record.images]

    moved = tmp_path_factory.mktemp("moved")
    first = sorted(folder.parent.glob(str(write(folder, ROWS).relative_to(folder.parent))))[0]
    (moved / first.name).write_bytes(first.read_bytes())
    assert names(moved / first.name) == names(first) == names(write(folder, ROWS))[: len(names(first))]


# Invalid data -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "not valid JSON: it ends within record 0"),
        ("a.json", '[{"a": 1}, {"b": ', "it ends within record 1; is it truncated"),
        ("a.json", '{"data": [{"a": 1}]}', "expected a list of records.*use .jsonl for one record per line"),
        ("a.json", '[{"a": 1} {"b": 2}]', "expected a list of records, with ',' at byte"),
        ("a.json", '["a", "b"]', "expected a list of records"),
        ("a.json", "[]", "non-empty list"),
        ("a.json", "", "is empty"),
        ("a.jsonl", "\n", "non-empty list"),
        ("a.parquet", "PAR1", "cannot be read as parquet"),
        ("a.tar", "no tar" * 200, "cannot be read as a tar file"),
        ("a.csv", "a,b", "expected .json, .jsonl, .parquet or .tar files, found .csv"),
    ],
)
def test_errors_name_a_file_with_invalid_content(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=f"{name}.*{message}"):
        open_records(tmp_path / name, RowOptions())


def test_errors_name_missing_data(tmp_path):
    with pytest.raises(UserError, match="absent.json does not exist"):
        open_records("absent.json", RowOptions())
    with pytest.raises(UserError, match="neither .tar shards nor .parquet files"):
        open_records(tmp_path, RowOptions())
    with pytest.raises(UserError, match="'hf:nobody/nothing' cannot be loaded"):
        open_records("hf:nobody/nothing", RowOptions())


def test_text_of_a_data_set_that_is_not_utf_8_is_a_bad_sample(tmp_path):
    import datasets
    import pyarrow

    text = pyarrow.array([b"\xff", b"hi"]).view(pyarrow.string())
    turns = pyarrow.array([json.dumps(ROWS[2]["conversations"])] * 2)
    table = pyarrow.table({"id": text, "conversations": turns})
    source = _records_of(datasets.Dataset(datasets.table.InMemoryTable(table)), tmp_path / "saved", tmp_path)
    assert one_record(source, 1).id == "hi"
    with pytest.raises(UserError, match="not valid UTF-8"):
        source.records(0)
    assert source.row_name(0).endswith("saved:0") and source.row_name(1).endswith("saved:1 (hi)")


def test_a_shard_that_becomes_unreadable_is_reported_as_such(tmp_path, monkeypatch):
    source = open_records(write_shard(tmp_path / "w.tar", [("x.png", png(1)), ("x.txt", b"a ring")]), RowOptions())

    def fail(*_):
        raise UserError("w.tar cannot be read")

    monkeypatch.setattr(source._files, "read", fail)
    with pytest.raises(UserError, match="^w.tar cannot be read"):
        source.records(0)


def test_a_data_set_without_conversations_names_its_columns(tmp_path):
    import datasets

    datasets.Dataset.from_dict({"image": ["a.png"], "label": [1]}).save_to_disk(str(tmp_path / "labels"))
    with pytest.raises(UserError, match="no column 'conversations'.* its columns are image, label"):
        open_records(tmp_path / "labels", RowOptions())


@pytest.mark.parametrize("line", ["{", "[" * 100_000, '{"conversations": 3}', "7", "\xff"])
def test_a_bad_line_is_one_bad_sample(tmp_path, line):
    good = json.dumps(ROWS[2])
    (tmp_path / "d.jsonl").write_bytes(b"\n".join([good.encode(), line.encode("latin-1"), good.encode()]))
    source = open_records(tmp_path / "d.jsonl", RowOptions())
    assert one_record(source, 0) == one_record(source, 2)
    with pytest.raises(UserError):
        source.records(1)
    assert source.row_name(1).endswith("d.jsonl:1")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("x.json", b"{"), ("x.png", png(1))], "not valid JSON"),
        ([("x.txt", b"\xff"), ("x.png", png(1))], "not valid JSON or text"),
        ([("x.png", png(1))], "no 'conversations'"),
        ([("x.txt", b"a"), ("x.txt", b"b"), ("x.png", png(1))], "occurs twice in the shard"),
        ([("x.txt", b"a"), ("x.0.png", png(1)), ("x.1.png", png(1))], "1 <image> .* 2 images"),
    ],
)
def test_a_bad_sample_of_a_shard_is_one_bad_sample(tmp_path, members, message):
    shard = write_shard(tmp_path / "w.tar", [("ok.txt", b"a ring"), ("ok.png", png(1)), *members])
    source = open_records(shard, RowOptions())
    assert len(source.records(0)) == 2
    with pytest.raises(UserError, match=message):
        source.records(1)
