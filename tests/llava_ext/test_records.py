import json

import pytest
from PIL import Image

from llava_ext.data.records import BadSamples, load_records, parse_record


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    return tmp_path


def turns(question, answer):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def test_an_image_in_a_human_turn_is_read_and_in_a_gpt_turn_is_drawn(folder):
    read = parse_record({"id": 1, "image": "a.png", "conversations": turns("<image>\nwhat?", "a")}, folder)
    drawn = parse_record({"image": "a.png", "conversations": turns("draw", "<image>")}, folder)
    both = parse_record({"image": ["a.png", "a.png"], "conversations": turns("<image> again", "<image>")}, folder)
    text = parse_record({"conversations": turns("hi", "ho")}, None)
    assert (read.kind, read.drawn, read.id) == ("read", (False,), "1")
    assert (drawn.kind, drawn.drawn) == ("draw", (True,))
    assert (both.kind, both.drawn) == ("draw", (False, True))
    assert (text.kind, text.images) == ("text", ())


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("not a record", "expected an object"),
        ({"image": "a.png"}, "no 'conversations'"),
        ({"conversations": []}, "no 'conversations'"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "turn 0"),
        ({"conversations": [{"from": "human", "value": "x"}]}, "nothing to learn"),
        ({"image": "a.png", "conversations": turns("no placeholder", "a")}, "0 <image> .* 1 images"),
        ({"conversations": turns("<image>", "a")}, "1 <image> .* 0 images"),
        ({"image": "b.png", "conversations": turns("<image>", "a")}, "'b.png' not found"),
        ({"image": "../a.png", "conversations": turns("<image>", "a")}, "leaves the image folder"),
        ({"image": "/etc/hostname", "conversations": turns("<image>", "a")}, "leaves the image folder"),
    ],
)
def test_what_is_wrong_with_a_record_is_said(folder, row, message):
    with pytest.raises(ValueError, match=message):
        parse_record(row, folder)


def test_bad_records_are_counted_named_and_limited(folder):
    rows = [{"id": str(i), "conversations": turns("hi", "ho")} for i in range(9)] + [{"id": "bad"}]
    file = folder / "data.json"
    file.write_text(json.dumps(rows))
    tolerant = BadSamples(folder / "report.jsonl", limit=0.1)
    assert len(load_records([file], folder, tolerant)) == 9
    tolerant.check(10)
    assert json.loads((folder / "report.jsonl").read_text())["sample"] == "data.json:bad"
    strict = BadSamples(folder / "report.jsonl", limit=0.001)
    load_records([file], folder, strict)
    with pytest.raises(ValueError, match="1 of 10 samples are unusable.*data.json:bad: no 'conversations'"):
        strict.check(10)


def test_jsonl_and_broken_files(folder):
    (folder / "data.jsonl").write_text("\n".join(json.dumps({"conversations": turns("a", "b")}) for _ in range(3)))
    assert len(load_records([folder / "data.jsonl"], None, BadSamples(None))) == 3
    (folder / "broken.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_records([folder / "broken.json"], None, BadSamples(None))
    with pytest.raises(ValueError, match="does not exist"):
        load_records([folder / "absent.json"], None, BadSamples(None))
