"""The border to files of other programs."""

import json
import os
import struct

import pytest

from evotok_plugin.common.foreign_files import open_regular, read_bytes, read_json, readable_json, reading
from evotok_plugin.errors import UserError


class PanicException(BaseException):  # noqa: N818 - as libraries in Rust name it
    """An error of a library in Rust."""


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("two\nlines"), struct.error("short"), KeyError("name"), RecursionError(), AssertionError(),
        OverflowError("x" * 10_000), PanicException("index out of range"), MemoryError(), UserError("no such value"),
    ],
)  # fmt: skip
def test_any_error_of_a_parser_becomes_one_line_that_names_the_file(error):
    with pytest.raises(UserError) as raised, reading("run/a.bin", "copy it again", "read"):
        raise error
    message = str(raised.value)
    assert message.startswith("run/a.bin cannot be read: ") and message.endswith("; copy it again")
    assert "\n" not in message and len(message) < 400


def test_an_error_that_names_the_file_is_kept_and_ctrl_c_passes():
    with pytest.raises(UserError, match="^a.bin is empty$"), reading("a.bin"):
        raise UserError("a.bin is empty")
    with pytest.raises(KeyboardInterrupt), reading("a.bin"):
        raise KeyboardInterrupt


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for path in (tmp_path / "pipe", tmp_path / "link", tmp_path, "/dev/zero"):
        with pytest.raises(OSError, match="expected a file"):
            open_regular(path)
    with pytest.raises(OSError):
        open_regular("a\0b")
    (tmp_path / "a").write_bytes(b"12345")
    with pytest.raises(OSError, match="it has 5 bytes, the limit is 4"):
        read_bytes(tmp_path / "a", limit=4)


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"\xff\xfe{", b"[1]", b"\x00" * 9])
def test_damaged_json_is_one_line(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as raised:
        read_json(path)
    assert str(raised.value).startswith(f"{path} cannot be read") and "\n" not in str(raised.value)
    assert readable_json(path) is None
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"a": 1}).encode())
    assert read_json(path) == {"a": 1}
