"""Files of drawing prompts."""

import pytest

from evotok_plugin.errors import UserError
from llava_ext.data.prompt_files import Prompt, read_prompts


def test_text_and_jsonl_files_are_read_in_order_without_duplicates(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffa cat\n\n a dog \n", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"prompt": "a dog", "tag": "x"}\n{"prompt": "two owls", "tag": "counting"}\n')
    found = read_prompts([tmp_path / "a.txt", str(tmp_path / "b.jsonl")])
    assert found == [Prompt("a cat"), Prompt("a dog"), Prompt("two owls", "counting")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "\n\n", "at least one prompt"),
        ("a.jsonl", "{", r"a.jsonl:1: expected a JSON object"),
        ("a.jsonl", '{"text": "a cat"}', r'"prompt"'),
        ("a.jsonl", '{"prompt": "a cat", "tag": 3}', r'"tag"'),
        ("a.txt", b"\xff\xfe\x00", "cannot be read as text"),
    ],
)
def test_unusable_files_are_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        read_prompts([path])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_prompts([tmp_path / "none.txt"])
