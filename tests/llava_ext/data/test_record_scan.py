"""The scan of all records before training."""

import numpy as np
import pytest
import torch
from record_files import ROWS, as_json, as_jsonl, as_parquet, as_shards, png, row, turns

from evotok_plugin.common.processes import Processes
from llava_ext.data.record_scan import scan_records
from llava_ext.data.record_sources import open_records
from llava_ext.data.records import KINDS, RowOptions, parse_record

ALONE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture(autouse=True)
def own_caches(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


@pytest.fixture
def folder(tmp_path):
    for number in range(12):
        (tmp_path / f"{number:02d}.png").write_bytes(png(number))
    return tmp_path


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


def test_an_image_of_several_records_is_listed_once(tiny_mllm, folder):
    """Also across sources; every record that needs a broken image gets its reason."""
    sources = [open_records(write(folder, ROWS), RowOptions(folder)) for write in (as_json, as_jsonl, as_parquet)]
    found = looked_at(tiny_mllm, sources)
    keys = [found.images.key(i) for i in range(len(found.images))]
    assert len(keys) == len(set(keys)) == 16 and found.records.sizes == [12, 12, 12]
    assert [found.images.picture(i).getpixel((0, 0))[0] for i in range(16)] == [0, 1, 3, 4, 6, 7, 9, 10] * 2
    needing = found.needing({"03.png": "broken", "nowhere.png": "not ours"})
    assert needing == {3: "image '03.png': broken", 15: "image '03.png': broken"}
    left = found.records.without(np.isin(np.arange(36), list(needing)))
    assert left.sizes == [11, 11, 12] and left[3] == found.records[4]


def test_two_processes_give_the_result_of_one(tiny_mllm, folder, monkeypatch):
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


def test_records_that_are_too_long_are_truncated_or_left_out(tiny_mllm, folder):
    image_last = {"id": "far", "image": "00.png", "conversations": turns("a ring " * 50, "<image>")}
    long_answer = {"id": "tail", "image": "00.png", "conversations": turns("<image>", "a ring " * 50)}
    long_question = {"id": "head", "conversations": turns("a ring " * 50, "a")}
    source = open_records(as_json(folder, [image_last, long_answer, long_question, row(0)]), RowOptions(folder))
    found = looked_at(tiny_mllm, [source], max_length=40)
    assert [record.id for record in found.records] == ["tail", "r0"] and found.records.lengths[0] == 40
    assert found.num_cut == 1 and found.num_records == 4 and not found.bad
    reasons = {name.split("(")[1]: why for name, why in found.too_long.items()}
    assert "do not include all images completely" in reasons["far)"] and "nothing to learn" in reasons["head)"]
