"""Images that rows refer to: spellings of paths, data URIs, empty and contradictory fields."""

import base64
import io
import os
import pickle
import unicodedata
from urllib.parse import quote

import pytest
from PIL import Image

from evotok_plugin.data.files import stamp_of
from evotok_plugin.errors import UserError
from llava_ext.data.named_images import find_image, image_names
from llava_ext.data.records import RowOptions, named_image, parse_record, parse_row
from llava_ext.prompts.image_parts import is_empty


def png(value=0):
    content = io.BytesIO()
    Image.new("RGB", (8, 8), (value,) * 3).save(content, "png")
    return content.getvalue()


def as_uri(content):
    return "data:image/png;base64," + base64.b64encode(content).decode()


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "a b.png", "sub/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png())
    return tmp_path


@pytest.mark.parametrize("value", [None, "", "  ", [], [""], [None, ""], {}, {"path": None}, float("nan"), b""])
def test_values_without_content_are_empty(value):
    assert is_empty(value)
    assert image_names({"images": value, "image": "a.png"}) == image_names({"image": value, "images": ["a.png"]})
    assert image_names({"image": value}) == []


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ({"image": "a"}, ["a"]),
        ({"image": ["a", "b"]}, ["a", "b"]),
        ({"image": {"path": "a", "bytes": None}}, ["a"]),
        ({"images": [{"path": "a"}, {"url": "b"}]}, ["a", "b"]),
        ({"image": "a", "images": ["a"]}, ["a"]),
        ({"image": {"base64": "QUJD"}}, ["data:;base64,QUJD"]),
        ({"image": {"bytes": "QUJD", "path": "a"}}, ["data:;base64,QUJD"]),
        ({"image": {"bytes": b"ABC", "path": "a"}}, ["data:;base64,QUJD"]),
    ],
)
def test_images_are_found_in_every_form(row, names):
    assert image_names(row) == names


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "a", "images": ["b"]}, r"'images' and 'image' name different images \(\['b'\] and \['a'\]\)"),
        ({"image": "a", "images": ["a", "b"]}, "name different images"),
        ({"image": {"path": "a", "url": "b"}}, "image: image 0 of 1: expected one picture, got 'url' and 'path'"),
        ({"images": ["a", None]}, "images: image 1 of 2 is empty"),
        ({"images": [["a"]]}, "images: expected paths, got list"),
        ({"image": 7}, "image: expected paths, got int"),
    ],
)
def test_invalid_image_fields_are_rejected(row, message):
    with pytest.raises(UserError, match=message):
        image_names(row)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("a.png", "a.png"),
        ("./sub/../a.png", "a.png"),
        ("{folder}/sub/a.png", "sub/a.png"),
        ("file://{folder}/a%20b.png", "a b.png"),
        ("sub\\a.png", "sub/a.png"),
        ("a b.png", "a b.png"),
    ],
)
def test_all_spellings_of_a_path_have_one_key_and_stamp(folder, name, key):
    found, plain = find_image(name.format(folder=folder), folder), find_image(key, folder)
    assert (found.key, found.stamp) == (key, plain.stamp) and found.content() == png()


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_unicode_normal_forms_are_equivalent(folder, form):
    on_disk = unicodedata.normalize(form, "é/ñ.png")
    (folder / on_disk).parent.mkdir()
    (folder / on_disk).write_bytes(png(7))
    for other in ("NFC", "NFD"):
        found = find_image(unicodedata.normalize(other, on_disk), folder)
        assert found.key == on_disk and found.content() == png(7)


def test_an_image_folder_can_be_a_link_or_below_the_home_folder(folder, tmp_path_factory, monkeypatch):
    link = tmp_path_factory.mktemp("links") / "link"
    link.symlink_to(folder)
    assert find_image(str(folder / "a.png"), link).key == "a.png"
    monkeypatch.setenv("HOME", str(link.parent))
    assert RowOptions("~/link").image_folder == link


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("b.png", "'b.png' not found"),
        ("C:\\images\\a.png", "not found"),
        ("../a.png", "is outside the image folder"),
        ("/etc/hostname", "is outside the image folder"),
        ("sub", "is a folder, a pipe or a device"),
        ("pipe.png", "is a folder, a pipe or a device"),
        ("https://example.org/a.png", "URLs are not fetched, .* download it first"),
        ("GS://bucket/a.png", "URLs are not fetched"),
        ("file://server/a.png", "it is on host 'server'"),
        ("a\0.png", "contains a NUL character"),
        ("data:image/png;base64,", "embedded image is empty"),
        ("data:image/png;base64,AAAAA", "its base64 content is broken"),
        ("data:image/png", "no comma"),
    ],
)
def test_errors_about_missing_images_give_the_cause(folder, name, message):
    os.mkfifo(folder / "pipe.png")
    with pytest.raises(UserError, match=message):
        find_image(name, folder)


@pytest.mark.parametrize(
    "start", ["data:image/png;base64,", "", "https://example.org/", "data:", "/9j/", "data:;base64,="]
)
def test_error_messages_about_long_names_are_short(folder, start):
    with pytest.raises(UserError) as told:
        find_image(f"{start}{'A' * 3_000_001}", folder)
    assert len(str(told.value)) < 400


@pytest.mark.parametrize("bare", [False, True])
def test_an_image_in_the_row_is_identified_by_its_content(bare):
    names = [as_uri(png(value)).removeprefix("data:image/png;base64," if bare else "") for value in (1, 2, 1)]
    one, other, again = (find_image(name, None) for name in names)
    assert one == again and one.key != other.key and one.content() == png(1) and other.content() == png(2)
    assert one.stamp == stamp_of(one.key)
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}]
    record = parse_record({"image": names[0], "conversations": turns}, None)
    assert record.images == (one.key,) and record.stamps == (one.stamp,)
    assert named_image({"image": names[0], "conversations": turns}, RowOptions(), 0).content() == png(1)


def test_all_spellings_of_an_embedded_image_have_one_key(folder):
    text = base64.b64encode(png(3)).decode()
    names = [text, f"DATA:;base64,{text}", f"data:application/octet-stream;base64,{text}", f"data:,{quote(png(3))}"]
    assert {find_image(name, None).key for name in names} == {find_image(text, None).key}
    assert find_image(names[-1], None).content() == png(3)


@pytest.mark.parametrize("name", ["a#1.png", "a?2.png"])
def test_a_file_url_keeps_hashes_and_question_marks(folder, name):
    (folder / "a").write_bytes(png(1))
    (folder / name).write_bytes(png(2))
    assert find_image(f"file://{folder}/{name}", folder).key == name


def test_a_replaced_file_keeps_its_key_and_changes_its_stamp(folder):
    before = find_image("a.png", folder)
    (folder / "a.png").write_bytes(png(200))
    after = find_image("a.png", folder)
    assert after.key == before.key and after.stamp != before.stamp and after.stamp[:8] == before.stamp[:8]


def test_the_rows_of_a_source_look_at_an_image_file_once(folder, monkeypatch):
    row = {"image": "a.png", "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}]}
    options = RowOptions(folder)
    (before,) = parse_row(row, options)
    (folder / "a.png").write_bytes(png(200))
    assert parse_row(row, options)[0].stamps == before.stamps
    (after,) = parse_row(row, RowOptions(folder))  # the next run sees the new file
    assert after.images == before.images and after.stamps != before.stamps
    monkeypatch.setattr(os, "stat", None)
    assert parse_row(row, pickle.loads(pickle.dumps(options)))[0] == before  # nor in a process that loads data


def test_images_that_were_not_found_and_embedded_ones_are_not_remembered(folder):
    options = RowOptions(folder)
    with pytest.raises(UserError, match="not found"):
        options.find_image("late.png")
    (folder / "late.png").write_bytes(png(5))
    assert options.find_image("late.png").content() == png(5)
    options.find_image(as_uri(png(6)))
    assert len(pickle.dumps(options)) < len(pickle.dumps(RowOptions(folder))) + 500
