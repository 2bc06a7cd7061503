"""JSON files of every layout."""

import json

import pytest

from evotok_plugin.errors import UserError
from llava_ext.data.json_records import JsonRecords
from llava_ext.data.record_sources import open_records
from llava_ext.data.records import RowOptions

ROW = {"id": "r", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho [{]}"}]}
LINES = f"{json.dumps(ROW)}\n\n{json.dumps(ROW)}\n"


@pytest.mark.parametrize(
    ("name", "content", "rows"),
    [
        ("a.json", json.dumps([ROW, ROW]), 2),
        ("a.JSON", json.dumps([ROW, ROW], indent=1), 2),
        ("a.jsonl", LINES, 2),
        ("a.ndjson", LINES, 2),
        ("lines.json", LINES, 2),
        ("list.jsonl", json.dumps([ROW, ROW], indent=1), 2),
        ("one.json", json.dumps(ROW, indent=1), 1),
        ("bom.json", "\ufeff" + json.dumps([ROW, ROW]), 2),
        ("bom.jsonl", "\ufeff" + LINES, 2),
        ("bom_lines.json", "\ufeff" + LINES, 2),
        ("data[v2].json", json.dumps([ROW]), 1),
        ("with space.json", json.dumps([ROW]), 1),
    ],
)
def test_the_layout_of_a_file_is_detected_from_its_content(tmp_path, name, content, rows):
    (tmp_path / name).write_text(content)
    source = open_records(tmp_path / name, RowOptions())
    assert isinstance(source, JsonRecords) and len(source) == rows
    assert all(source.records(index)[0].id == "r" for index in range(rows))
    assert len({source.row_name(index) for index in range(rows)}) == rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps({"a": ROW, "b": ROW}), "an object of 2 records; write its values as a list"),
        (json.dumps({"data": [ROW]}), "expected a list of records"),
        (json.dumps([ROW]).encode("utf-16"), "is UTF-16 text; save it as UTF-8"),
    ],
)
def test_errors_describe_a_file_that_is_not_a_list(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        open_records(tmp_path / "a.json", RowOptions())


@pytest.mark.parametrize("content", ['[{"id": "' + '\\"' * 200_000, "[" + '"' * 200_001, '[{"a": "x'])
def test_an_unterminated_string_is_scanned_once(tmp_path, content, monkeypatch):
    """As one string up to the end of the file, not as one string for every quote in it."""
    from llava_ext.data import json_records

    scan, found = json_records._STRING_OR_BRACKET, []

    class Counting:
        def finditer(self, text):
            for match in scan.finditer(text):
                found.append(match.span())
                yield match

    monkeypatch.setattr(json_records, "_STRING_OR_BRACKET", Counting())
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=r"the quote at byte \d+, in record 0, is not closed; is it truncated"):
        open_records(tmp_path / "a.json", RowOptions())
    assert found[-1][1] == len(content) and sum(end - start for start, end in found) <= len(content)


def test_folders_of_records_are_read_by_kind(tmp_path, caplog):
    (tmp_path / "a.json").write_text(json.dumps([ROW]))
    (tmp_path / "b.JSONL").write_text(LINES)
    (tmp_path / "README.md").write_text("")
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / "._a.json").write_text("no JSON")
    assert len(open_records(f"{tmp_path}/", RowOptions())) == 3
    assert caplog.messages == [f"{tmp_path}: 2 files skipped: 1 .json, 1 .md"]
    (tmp_path / "c.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="several kinds of data .*select files with a pattern"):
        open_records(tmp_path, RowOptions())


@pytest.mark.parametrize("name", ["a.json.gz", "a.tar.gz", "a.zip"])
def test_compressed_files_are_rejected(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=f"{name}' is compressed .*unpack it first"):
        open_records(tmp_path / name, RowOptions())


def test_a_file_that_cannot_be_read_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="absent.json cannot be read: No such file"):
        JsonRecords([tmp_path / "absent.json"], "data", RowOptions())


def test_a_long_id_is_shortened_in_names(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([ROW | {"id": "x" * 100_000}]))
    assert len(open_records(tmp_path / "a.json", RowOptions()).row_name(0)) < 300 + len(str(tmp_path))
