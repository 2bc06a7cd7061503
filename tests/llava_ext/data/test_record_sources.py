"""Records from files of every kind: the same rows, whatever they are kept in."""

import io
import json
import multiprocessing
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from evotok_plugin.common.processes import Processes
from llava_ext.data.mixture import Mixture
from llava_ext.data.record_scan import scan_records
from llava_ext.data.record_sources import open_records
from llava_ext.data.records import KINDS, RowOptions, parse_record

ALONE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture(autouse=True)
def own_caches(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


def png(value):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value, value, value)).save(buffer, "png")
    return buffer.getvalue()


def turns(question, answer):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def row(number):
    """Read, drawn and text-only rows by turns; text with all that may disturb a scanner of JSON."""
    kinds = [turns("<image>\nwhat?", f"a {number}"), turns(f"draw {number}", "<image>"), turns('say "}]\\"', "{[ä\n")]
    image = {} if number % 3 == 2 else {"image": f"{number:02d}.png"}
    return {"id": f"r{number}", **image, "conversations": kinds[number % 3]}


ROWS = [row(number) for number in range(12)]


@pytest.fixture
def folder(tmp_path):
    for number in range(12):
        (tmp_path / f"{number:02d}.png").write_bytes(png(number))
    return tmp_path


def write_shard(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def as_json(folder, rows):
    (folder / "d.json").write_text(json.dumps(rows, indent=1))
    return folder / "d.json"


def as_jsonl(folder, rows):
    (folder / "d.jsonl").write_text("\n".join(json.dumps(one, ensure_ascii=False) for one in rows) + "\n\n")
    return folder / "d.jsonl"


def as_shards(folder, rows):
    for shard in range(0, len(rows), 5):
        members = []
        for number, one in enumerate(rows[shard : shard + 5]):
            if "image" in one:
                members.append((f"{number:03d}.png", (folder / one["image"]).read_bytes()))
            members.append((f"{number:03d}.json", json.dumps(one).encode()))
        write_shard(folder / f"s{shard:02d}.tar", members)
    return folder / "s*.tar"


def as_dataset(folder, rows, embed=True):
    import datasets

    kept = [
        one | {"image": {"bytes": (folder / one["image"]).read_bytes() if embed else None, "path": one["image"]}}
        if "image" in one else one | {"image": None}
        for one in rows
    ]  # fmt: skip
    turn = {"from": datasets.Value("string"), "value": datasets.Value("string")}
    image = datasets.Image() if embed else {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    features = {"id": datasets.Value("string"), "image": image, "conversations": [turn]}
    return datasets.Dataset.from_list(kept, datasets.Features(features))


def as_parquet(folder, rows):
    as_dataset(folder, rows[:7]).to_parquet(folder / "p0.parquet")
    as_dataset(folder, rows[7:]).to_parquet(folder / "p1.parquet")
    return folder / "p?.parquet"


def as_saved(folder, rows):
    as_dataset(folder, rows, embed=False).save_to_disk(str(folder / "saved"))
    return folder / "saved"


def as_hub(folder, rows):
    (folder / "hub").mkdir()
    as_dataset(folder, rows).to_parquet(folder / "hub" / "train.parquet")
    return f"hf:{folder / 'hub'}:train"


every_form = pytest.mark.parametrize("write", [as_json, as_jsonl, as_shards, as_parquet, as_saved, as_hub])


def one_record(source, index):
    (record,) = source.records(index)
    return record


# Every form holds the same ------------------------------------------------------------------------------------


@every_form
def test_rows_and_images_come_back_in_order(folder, write):
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
def test_an_empty_column_of_images_hides_no_other(folder, write):
    import datasets

    plain = as_dataset(folder, [one for one in ROWS if "image" in one], embed=write is as_parquet)
    both = plain.add_column("images", [[] for _ in range(len(plain))])
    both.save_to_disk(str(folder / "both"))
    source = open_records(folder / "both", RowOptions(folder))
    assert [source.picture(n, 0).getpixel((0, 0))[0] for n in range(8)] == [0, 1, 3, 4, 6, 7, 9, 10]
    filled = plain.add_column("images", [["00.png"] for _ in range(len(plain))])
    source = _records_of(filled, folder / "filled", folder)
    with pytest.raises(ValueError, match="'images' and 'image' hold different images"):
        source.records(3)
    videos = datasets.Dataset.from_list([{"conversations": turns("a", "b"), "video": name} for name in ("v.mp4", None)])
    source = _records_of(videos, folder / "videos", folder)
    assert len(source.records(1)) == 1
    with pytest.raises(ValueError, match="the row has 'video'; only text and images"):
        source.records(0)


def _records_of(dataset, where, folder):
    dataset.save_to_disk(str(where))
    return open_records(where, RowOptions(folder))


@pytest.mark.parametrize("dotted", [False, True])
def test_names_with_dots_pair_their_own_members(folder, dotted, caplog):
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
    with pytest.raises(ValueError, match="the sample has a .mp4 file; only text and images"):
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


def test_images_of_a_shard_come_in_the_order_of_their_numbers(folder):
    images = [(f"x.{number}.png", png(number)) for number in (10, 0, 2)]
    note = ("x.json", json.dumps({"conversations": turns("<image>" * 3, "a")}).encode())
    source = open_records(write_shard(folder / "w.tar", [*images, note]), RowOptions())
    assert [key.rpartition("/")[2] for key in one_record(source, 0).images] == ["x.0.png", "x.2.png", "x.10.png"]
    assert [source.picture(0, which).getpixel((0, 0))[0] for which in range(3)] == [0, 2, 10]


@pytest.mark.parametrize("note", [[], [("x.json", json.dumps({"url": "u", "width": 8}).encode())]])
def test_captions_of_a_shard_are_described_and_drawn(folder, note):
    """As img2dataset writes them: the .json, if there is one, says nothing that is learned."""
    shard = write_shard(folder / "w.tar", [("x.png", png(1)), ("x.txt", b"a ring\n"), *note])
    records = open_records(shard, RowOptions()).records(0)
    assert [record.kind for record in records] == ["read", "draw"] and records[0].images == records[1].images
    (record,) = open_records(shard, RowOptions(caption_task="draw")).records(0)
    assert [message["content"] for message in record.messages] == ["a ring", "<image>"]


# Names of images ----------------------------------------------------------------------------------------------


def test_shards_of_one_name_do_not_share_their_images_names(tmp_path):
    """A cache that serves two data sets would else give one the other's codes."""
    keys = set()
    for value in (1, 2):
        (tmp_path / str(value)).mkdir()
        members = [("x.png", png(value)), ("x.txt", b"a ring")]
        source = open_records(write_shard(tmp_path / str(value) / "0.tar", members), RowOptions(caption_task="read"))
        keys.update(one_record(source, 0).images)
    assert len(keys) == 2


@pytest.mark.parametrize("write", [as_shards, as_parquet])
def test_names_stay_when_files_move_or_are_added(folder, write, tmp_path_factory):
    def names(where):
        source = open_records(where, RowOptions())
        return [key for number in range(len(source)) for record in source.records(number) for key in record.images]

    moved = tmp_path_factory.mktemp("moved")
    first = sorted(folder.parent.glob(str(write(folder, ROWS).relative_to(folder.parent))))[0]
    (moved / first.name).write_bytes(first.read_bytes())
    assert names(moved / first.name) == names(first) == names(write(folder, ROWS))[: len(names(first))]


# What is wrong ------------------------------------------------------------------------------------------------


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
def test_a_file_that_cannot_be_understood_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        open_records(tmp_path / name, RowOptions())


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="absent.json does not exist"):
        open_records("absent.json", RowOptions())
    with pytest.raises(ValueError, match="neither .tar shards nor .parquet files"):
        open_records(tmp_path, RowOptions())
    with pytest.raises(ValueError, match="'hf:nobody/nothing' cannot be loaded"):
        open_records("hf:nobody/nothing", RowOptions())


def test_a_data_set_without_conversations_names_its_columns(tmp_path):
    import datasets

    datasets.Dataset.from_dict({"image": ["a.png"], "label": [1]}).save_to_disk(str(tmp_path / "labels"))
    with pytest.raises(ValueError, match="no column 'conversations'.* its columns are image, label"):
        open_records(tmp_path / "labels", RowOptions())


@pytest.mark.parametrize("line", ["{", "[" * 100_000, '{"conversations": 3}', "7", "\xff"])
def test_a_bad_line_is_one_bad_sample(tmp_path, line):
    good = json.dumps(ROWS[2])
    (tmp_path / "d.jsonl").write_bytes(b"\n".join([good.encode(), line.encode("latin-1"), good.encode()]))
    source = open_records(tmp_path / "d.jsonl", RowOptions())
    assert one_record(source, 0) == one_record(source, 2)
    with pytest.raises(ValueError):
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
    with pytest.raises(ValueError, match=message):
        source.records(1)


# The scan of records ------------------------------------------------------------------------------------------


def looked_at(tiny_mllm, sources, max_length=2048):
    return scan_records(sources, tiny_mllm[1], max_length, ALONE, num_workers=1)


def test_a_scan_finds_usable_records_and_the_images_they_need(tiny_mllm, folder):
    rows = [*ROWS, {"id": "bad"}, row(0) | {"image": "absent.png"}]
    found = looked_at(tiny_mllm, [open_records(as_jsonl(folder, rows), RowOptions(folder))])
    assert [found.records[i] for i in range(12)] == [parse_record(one, folder) for one in ROWS]
    assert [KINDS[kind] for kind in found.records.kinds] == ["read", "draw", "text"] * 4
    layouts = [tiny_mllm[1].lay_out(record.messages) for record in found.records]
    assert found.records.lengths.tolist() == [layout.num_steps for layout in layouts]
    assert list(found.bad) == [f"{folder}/d.jsonl:12 (bad)", f"{folder}/d.jsonl:13 (r0)"]
    assert found.num_records == 14 and found.num_cut == 0 and not found.too_long


def test_an_image_that_many_need_is_there_once(tiny_mllm, folder):
    """Over all sources; what is broken of it is told for every record."""
    sources = [open_records(write(folder, ROWS), RowOptions(folder)) for write in (as_json, as_jsonl, as_parquet)]
    found = looked_at(tiny_mllm, sources)
    keys = [found.images.key(i) for i in range(len(found.images))]
    assert len(keys) == len(set(keys)) == 16 and found.records.sizes == [12, 12, 12]
    assert [found.images.picture(i).getpixel((0, 0))[0] for i in range(16)] == [0, 1, 3, 4, 6, 7, 9, 10] * 2
    needing = found.needing({"03.png": "broken", "nowhere.png": "not ours"})
    assert needing == {3: "image '03.png': broken", 15: "image '03.png': broken"}
    left = found.records.without(np.isin(np.arange(36), list(needing)))
    assert left.sizes == [11, 11, 12] and left[3] == found.records[4]


def test_two_processes_find_what_one_finds(tiny_mllm, folder, monkeypatch):
    monkeypatch.setattr("llava_ext.data.record_scan._CHUNK", 5)
    sources = [open_records(write(folder, ROWS), RowOptions(folder)) for write in (as_json, as_shards)]
    alone = looked_at(tiny_mllm, sources)
    parts = []

    class Half(Processes):
        def gather(self, value):
            parts.append(value)
            return parts if len(parts) == 2 else [value, value]

    for rank in (0, 1):
        both = scan_records(sources, tiny_mllm[1], 2048, Half(rank, 2, ALONE.device), num_workers=1)
    assert list(both.records) == list(alone.records)
    assert [both.images.key(i) for i in range(len(both.images))] == [
        alone.images.key(i) for i in range(len(alone.images))
    ]


def test_what_is_too_long_is_cut_or_left_out_and_counted(tiny_mllm, folder):
    image_last = {"id": "far", "image": "00.png", "conversations": turns("a ring " * 50, "<image>")}
    long_answer = {"id": "tail", "image": "00.png", "conversations": turns("<image>", "a ring " * 50)}
    long_question = {"id": "head", "conversations": turns("a ring " * 50, "a")}
    source = open_records(as_json(folder, [image_last, long_answer, long_question, row(0)]), RowOptions(folder))
    found = looked_at(tiny_mllm, [source], max_length=40)
    assert [record.id for record in found.records] == ["tail", "r0"] and found.records.lengths[0] == 40
    assert found.num_cut == 1 and found.num_records == 4 and not found.bad
    reasons = {name.split("(")[1]: why for name, why in found.too_long.items()}
    assert "do not include all images completely" in reasons["far)"] and "nothing to learn" in reasons["head)"]


# Mixtures -----------------------------------------------------------------------------------------------------


def test_without_weights_an_epoch_is_every_record_once():
    mixture = Mixture([5, 20], seed=3)
    first, second = mixture.order(0), mixture.order(1)
    assert sorted(first) == sorted(second) == list(range(25)) and first.tolist() != second.tolist()
    assert first.tolist() == Mixture([5, 20], seed=3).order(0).tolist()
    assert first.tolist() != Mixture([5, 20], seed=4).order(0).tolist()


def test_weights_are_shares_of_every_stretch():
    mixture = Mixture([3_000, 100], [1, 3], seed=0)
    order = np.concatenate([mixture.order(epoch) for epoch in range(3)])
    assert len(order) == 3 * len(mixture) == 9_300
    for start in range(0, len(order) - 1024, 1024):
        assert (order[start : start + 1024] >= 3_000).sum() == 768


def test_a_weighted_source_runs_through_all_before_any_comes_again():
    """From epoch to epoch, and in another order every time."""
    mixture = Mixture([70, 30], [1, 1], seed=0)
    order = np.concatenate([mixture.order(epoch) for epoch in range(30)])
    for first, size in ((0, 70), (70, 30)):
        mine = order[(order >= first) & (order < first + size)]
        rounds = mine[: len(mine) // size * size].reshape(-1, size)
        assert len(rounds) > 10 and all(sorted(one) == list(range(first, first + size)) for one in rounds)
        assert rounds[0].tolist() != rounds[1].tolist()


def test_any_epoch_can_be_had_without_those_before():
    mixture = Mixture([700, 900], [2, 1], seed=5)
    in_turn = [mixture.order(epoch).tolist() for epoch in range(4)]
    assert in_turn[3] == Mixture([700, 900], [2, 1], seed=5).order(3).tolist()


@pytest.mark.parametrize(
    ("sizes", "weights", "message"),
    [
        ([5, 5], [1.0], "expected 2 above 0"),
        ([5, 5], [1.0, 0.0], "expected 2 above 0"),
        ([5, 5], [1.0, 1e-6], "entry 1 of data_path would get less than 1 of 1024"),
        ([5, 0], [1.0, 1.0], "entry 1 of data_path has no usable records"),
    ],
)
def test_weights_that_cannot_be_met_are_refused(sizes, weights, message):
    with pytest.raises(ValueError, match=message):
        Mixture(sizes, weights)
