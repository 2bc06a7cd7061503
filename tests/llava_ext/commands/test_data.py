"""`evotok-llava data draw`."""

import json

import pytest
from record_files import png, turns

from llava_ext.cli import main
from llava_ext.data.record_sources import open_records
from llava_ext.data.records import RowOptions

ROWS = [
    {"id": "a", "image": "0.png", "conversations": turns("Describe the image concisely.\n<image>", "a réd disc")},
    {"id": "b", "image": "0.png", "conversations": turns("<image>\nHow many discs?", "One disc.")},
    {"image": "0.png", "conversations": turns("<image>", "a page with \\<image>")},
    {"id": "c", "conversations": turns("hi", "hello there")},
    {"id": "broken"},
]


@pytest.fixture
def records(tmp_path):
    (tmp_path / "0.png").write_bytes(png(3))
    path = tmp_path / "in.json"
    path.write_text(json.dumps(ROWS))
    return path


@pytest.mark.parametrize("name", ["out.json", "out.jsonl"])
def test_drawing_samples_follow_their_descriptions(records, tmp_path, capsys, name):
    assert main(["data", "draw", str(records), "-o", str(tmp_path / name)]) == 0
    shown = capsys.readouterr().out
    assert "5 conversations, 2 of them describe an image, 2 are also drawn" in shown and "draw: 'a réd disc'" in shown
    source = open_records(tmp_path / name, RowOptions(tmp_path))
    rows = [source.row(index) for index in range(len(source))]
    assert [row for row in rows if row in ROWS] == ROWS and len(rows) == 7
    assert rows[1] == {"id": "a-draw", "image": "0.png", "conversations": turns("a réd disc", "<image>")}
    (drawn,) = source.records(4)
    assert drawn.kind == "draw" and drawn.messages[0]["content"] == "a page with \\<image>"


def test_the_file_gives_the_records_of_the_training_setting(records, tmp_path):
    assert main(["data", "draw", str(records), "-o", str(tmp_path / "out.json"), "--only"]) == 0
    converted = open_records(tmp_path / "out.json", RowOptions(tmp_path))
    source = open_records(records, RowOptions(tmp_path, draw_share=1.0))
    expected = [record.messages for index in (0, 2) for record in source.records(index)[1:]]
    assert [converted.records(index)[0].messages for index in range(len(converted))] == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-o", "{in}"], "in.json exists; name another file"),
        (["-o", "{out}", "--share", "2"], "draw_share must be from 0 to 1"),
        (["-o", "{out}", "--share", "0", "--only"], "nothing is written"),
    ],
)
def test_wrong_input_is_reported(records, tmp_path, capsys, flags, message):
    flags = [flag.format(**{"in": records, "out": tmp_path / "o.json"}) for flag in flags]
    assert main(["data", "draw", str(records), *flags]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "o.json").exists()
