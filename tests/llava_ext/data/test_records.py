"""Validation of rows and their conversion to records."""

import base64
import json

import pytest
from PIL import Image

from evotok_plugin.data.images import as_picture
from evotok_plugin.errors import UserError
from llava_ext.data.records import RowOptions, named_image, parse_record, parse_row
from llava_ext.prompts.image_parts import IMAGE_PARTS
from llava_ext.prompts.messages import read_messages
from llava_ext.prompts.placeholders import split_at_images


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


def test_a_row_may_show_an_image_that_was_drawn_before(folder):
    talk = [*turns("draw", "<image>"), *turns("and what is it?", "a ring")]
    shown = parse_record({"image": "a.png", "conversations": talk, "drawn": [False]}, folder)
    assert (shown.kind, shown.drawn) == ("read", (False,))
    again = [*turns("draw", "<image>"), *turns("once more", "<image>")]
    both = parse_record({"image": ["a.png", "a.png"], "conversations": again, "drawn": [False, True]}, folder)
    assert (both.kind, both.drawn) == ("draw", (False, True))


def test_messages_and_conversations_give_the_same_record(folder):
    image = {"image": "a.png"}
    llava = parse_record(image | {"conversations": turns("<image>\nwhat?", "a")}, folder)
    strings = [{"role": "user", "content": "<image>\nwhat?"}, {"role": "assistant", "content": "a"}]
    parts = [
        {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
    ]
    assert parse_record(image | {"messages": strings}, folder) == llava
    assert parse_record({"images": [{"path": "a.png"}], "messages": parts, "conversations": None}, folder) == llava


@pytest.mark.parametrize(("task", "kinds"), [("read", ["read"]), ("draw", ["draw"]), ("both", ["read", "draw"])])
def test_a_caption_is_a_record_for_each_task(folder, task, kinds):
    records = parse_row({"image": "a.png", "caption": " a ring\n"}, RowOptions(folder, task))
    assert [record.kind for record in records] == kinds
    assert all("a ring" in [message["content"] for message in record.messages] for record in records)


def test_all_spellings_of_a_path_have_one_key(folder):
    (folder / "sub").mkdir()
    for name in ("a.png", "./a.png", "sub/../a.png", str(folder / "a.png")):
        assert parse_record({"image": name, "conversations": turns("<image>", "a")}, folder).images == ("a.png",)


def test_embedded_images_take_precedence():
    row = {"image": "elsewhere.png", "conversations": turns("<image><image>", "a")}
    (record,) = parse_row(row, RowOptions(), embedded=["shard/1.0.png", "shard/1.1.png"])
    assert record.images == ("shard/1.0.png", "shard/1.1.png")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("not a record", "expected an object"),
        ({"image": "a.png"}, "no 'conversations'"),
        ({"conversations": []}, "no 'conversations'"),
        ({"caption": " ", "image": "a.png"}, "no 'conversations'"),
        ({"caption": "a ring"}, "1 <image> .* 0 images"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "turn 0"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "turn 0"),
        ({"messages": [{"role": "user", "content": None}]}, "turn 0"),
        ({"conversations": [{"from": "human", "value": "x"}]}, "nothing to learn"),
        ({"image": "a.png", "conversations": turns("no placeholder", "a")}, "0 <image> .* 1 images"),
        ({"conversations": turns("<image>", "a")}, "1 <image> .* 0 images"),
        ({"conversations": turns("half \ud83d", "a")}, "turn 0 is not valid Unicode"),
        ({"image": 7, "conversations": turns("<image>", "a")}, "expected paths, got int"),
        ({"image": "b.png", "conversations": turns("<image>", "a")}, "'b.png' not found"),
        ({"image": "a.png", "conversations": turns("<image>", "a"), "drawn": [True]}, "outside the assistant's turns"),
        ({"image": "a.png", "conversations": turns("a", "<image>"), "drawn": [1]}, r"for each of 1 images, got \[1\]"),
        ({"image": "a.png", "conversations": turns("a", "<image>"), "drawn": []}, r"for each of 1 images, got \[\]"),
        ({"image": "../a.png", "conversations": turns("<image>", "a")}, "outside the image folder"),
        ({"image": "/etc/hostname", "conversations": turns("<image>", "a")}, "outside the image folder"),
    ],
)
def test_invalid_rows_are_reported(folder, row, message):
    with pytest.raises(UserError, match=message):
        parse_record(row, folder)


def test_an_image_without_an_image_folder_names_the_flag():
    with pytest.raises(UserError, match="no image folder; pass --image_folder"):
        parse_record({"image": "a.png", "conversations": turns("<image>", "a")}, None)


def test_an_unknown_caption_task_is_rejected():
    with pytest.raises(UserError, match="caption_task: expected one of read, draw, both, got 'paint'"):
        RowOptions(caption_task="paint")


def test_a_literal_image_in_parts_and_captions_is_text(folder):
    parts = [{"type": "image"}, {"type": "text", "text": "What does <image> mean?"}]
    row = {
        "image": "a.png",
        "messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "a tag"}],
    }
    record = parse_record(row, folder)
    assert record.drawn == (False,) and split_at_images(record.messages[0]["content"])[1] == "\nWhat does <image> mean?"
    read, drawn = parse_row({"image": "a.png", "caption": "the <image> tag"}, RowOptions(folder))
    assert (read.drawn, drawn.drawn) == ((False,), (True,))
    escaped = parse_record({"conversations": turns(r"What does \<image> mean?", "a tag")}, None)
    assert escaped.kind == "text"


@pytest.mark.parametrize(
    "row",
    [
        {"images": [], "image": "a.png"},
        {"image": "", "images": ["a.png"]},
        {"image": None, "images": [{"path": "a.png"}]},
        {"image": "a.png", "video": None, "videos": [], "audio": ""},
        {"image": "a.png", "messages": [], "caption": ""},
        {"image": "a.png", "images": ["a.png"]},
    ],
)
def test_empty_fields_count_as_absent(folder, row):
    record = parse_record(row | {"conversations": turns("<image>\nwhat?", "a")}, folder)
    assert record.images == ("a.png",) and record.kind == "read"


@pytest.mark.parametrize("empty", ["", None, [], float("nan")])
def test_a_text_row_may_have_an_empty_image(empty):
    assert parse_record({"image": empty, "conversations": turns("hi", "ho")}, None).images == ()


def test_conversations_may_be_json_text_or_lists_by_field(folder):
    plain = parse_record({"conversations": turns("hi", "ho")}, None)
    columns = {"from": ["human", "gpt"], "value": ["hi", "ho"]}
    for form in (json.dumps(turns("hi", "ho")), columns):
        assert parse_record({"conversations": form}, None) == plain


def test_parts_of_messages_may_name_their_images(folder):
    def asked(**part):
        content = [{"type": "image"} | part, {"type": "text", "text": "what?"}]
        return [{"role": "user", "content": content}, {"role": "assistant", "content": "a"}]

    plain = parse_record({"image": "a.png", "messages": asked()}, folder)
    for part in ({"image": "a.png"}, {"path": "a.png"}, {"type": "image_url", "image_url": {"url": "a.png"}}):
        assert parse_record({"messages": asked(**part)}, folder) == plain
        assert parse_record({"image": "a.png", "messages": asked(**part)}, folder) == plain
    with pytest.raises(UserError, match="'image' and 'messages' name different images"):
        parse_record({"image": "a.png", "messages": asked(image="b.png")}, folder)


def test_training_rows_and_processors_find_the_same_pictures_in_parts(folder):
    content = (folder / "a.png").read_bytes()
    text = base64.b64encode(content).decode()
    uri = f"data:image/png;base64,{text}"
    parts = [
        *({key: value} for key in ("image", "image_url", "url", "path") for value in (text, uri, {"url": uri})),
        *({key: {"base64": text}} for key in ("image", "image_url")),
        *({"base64": value, "path": None, "url": ""} for value in (text, uri)),
        {"image": {"bytes": text, "path": "a.png"}},
        {"image": {"bytes": content, "path": "a.png"}},
    ]
    answer = {"role": "assistant", "content": "a"}

    def asked(**part):
        return [{"role": "user", "content": [part]}, answer]

    for kind in IMAGE_PARTS:
        for part in parts:
            messages = asked(type=kind, **part)
            assert named_image({"messages": messages}, RowOptions(), 0).content() == content, part
            (picture,) = read_messages(messages)[1]
            assert as_picture(picture).tobytes() == as_picture(content).tobytes(), part
    for part, message in (
        ({"path": "a.png", "base64": text}, "one picture, got 'path' and 'base64'"),
        ({"base64": "AAAAA"}, "its base64 content is broken"),
        ({"url": "https://example.org/a.png"}, "URLs are not fetched"),
    ):
        with pytest.raises(UserError, match=message):
            parse_record({"messages": asked(type="image", **part)}, folder)
        with pytest.raises(UserError, match=message):
            read_messages(asked(type="image", **part))


def test_a_system_turn_can_show_an_image_and_gpt_can_start(folder):
    talk = [{"from": "system", "value": "<image>"}, *turns("what?", "a")]
    assert parse_record({"image": "a.png", "conversations": talk}, folder).drawn == (False,)
    assert len(parse_record({"conversations": [{"from": "gpt", "value": "hi"}, *turns("a", "b")]}, None).messages) == 3


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "a.png", "video": "v.mp4"}, "the row has 'video'; only text and images are supported"),
        ({"videos": ["v.mp4"]}, "the row has 'videos'"),
        ({"audio": {"path": "a.wav"}}, "the row has 'audio'"),
        (
            {"conversations": turns("<video>\nwhat?", "a")},
            "turn 0 contains <video>; only text and images",
        ),
        ({"conversations": turns("what?", "<audio>")}, "turn 1 contains <audio>"),
        ({"image": "", "conversations": turns("<image>", "a")}, "'image' and 'images' are missing or empty"),
        ({"conversations": turns("a tag?", "<image>")}, "1 <image> .* 0 images"),
        ({"image": "a.png", "conversations": turns("what?", "a")}, "write <image> where each image belongs"),
        ({"conversations": turns("what?", " ")}, "turn 1: the answer of 'gpt' is empty"),
        ({"conversations": "no JSON"}, "'conversations' is text that is not valid JSON"),
    ],
)
def test_unsupported_content_is_rejected(folder, row, message):
    with pytest.raises(UserError, match=message):
        parse_record({"conversations": turns("what?", "a")} | row, folder)


def test_error_messages_about_long_turns_are_short():
    with pytest.raises(UserError) as told:
        parse_record({"conversations": [{"from": "robot", "value": "x" * 3_000_000}]}, None)
    assert len(str(told.value)) < 300
