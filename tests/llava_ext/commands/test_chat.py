import io
import json

import numpy as np
import pytest
from PIL import Image

from evotok_plugin.errors import UserError
from llava_ext.cli import main
from llava_ext.commands.chat import extract_images, open_chat_image
from llava_ext.generation import AnswerOptions, ImageDrawn, TextDelta
from llava_ext.serving.session import ChatSession

DRAW = AnswerOptions(image_first=True)
TALK = AnswerOptions(max_new_tokens=4, max_images=0)


@pytest.fixture
def picture(tmp_path):
    """A red image of 60 x 40 pixels as a file whose name contains a space."""
    path = tmp_path / "my cat.png"
    Image.new("RGB", (60, 40), "red").save(path)
    return path


@pytest.fixture
def chat(model_folder, tmp_path, capsys, monkeypatch):
    """`chat(lines, *flags)` feeds lines to the command and returns its stdout and stderr."""

    def run(lines, *flags):
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(map(str, lines)) + "\n"))
        flags = [*map(str, flags), "--max_new_tokens", "4", "-o", str(tmp_path / "drawn")]
        assert main(["chat", "--model", str(model_folder), *flags]) == 0
        return capsys.readouterr()

    return run


# A conversation --------------------------------------------------------------------------------------------------


def test_the_model_can_be_asked_about_an_image_it_drew(tiny_mllm):
    model, processor = tiny_mllm
    session = ChatSession()
    events = list(session.ask(model, processor, "a photo of a ring", [], DRAW, seed=3))
    (drawn,) = [event.image for event in events if isinstance(event, ImageDrawn)]
    list(session.ask(model, processor, "What shape is it?", [], TALK, seed=4))
    assert [message["role"] for message in session.messages] == ["user", "assistant"] * 2
    inputs = processor.apply_chat_template(session.messages, tokenize=True)
    np.testing.assert_array_equal(inputs["pixel_values"], processor.image_processor(drawn).pixel_values)


def test_the_conversation_so_far_is_part_of_the_prompt(tiny_mllm, monkeypatch):
    model, processor = tiny_mllm
    seen, stream = [], type(model).stream

    def watched(model, inputs, *arguments):
        seen.append(processor.decode(inputs["input_ids"][0]))
        return stream(model, inputs, *arguments)

    monkeypatch.setattr(type(model), "stream", watched)
    session = ChatSession()
    for text in ("red circles", "blue squares"):
        list(session.ask(model, processor, text, [], TALK, seed=0))
    assert "red circles" in seen[1] and seen[1].index("red circles") < seen[1].index("blue squares")


def test_text_of_the_model_is_never_read_as_an_image_placeholder(tiny_mllm, monkeypatch):
    model, processor = tiny_mllm
    events = [TextDelta(0, "an <ima"), TextDelta(0, "ge> and <|image_pad|>")]
    monkeypatch.setattr(type(model), "stream", lambda *arguments: iter(events))
    session = ChatSession()
    list(session.ask(model, processor, "hi", [], TALK, seed=0))
    inputs = processor.apply_chat_template(session.messages, tokenize=True)
    assert "pixel_values" not in inputs and processor.image_token_id not in inputs["input_ids"]
    assert "an <image> and <|image_pad|>" in processor.decode(inputs["input_ids"][0])


def test_the_conversation_is_unchanged_if_an_image_cannot_be_written(chat, tmp_path, monkeypatch):
    from llava_ext.commands import chat as command

    def full(*arguments):
        raise UserError("disk full")

    monkeypatch.setattr(command, "write_drawn", full)
    written = chat(["/draw a ring", f"/save {tmp_path / 'saved'}"])
    assert "disk full" in written.err
    assert json.loads((tmp_path / "saved" / "conversation.json").read_text()) == []


def test_an_output_folder_that_cannot_be_written_is_reported_at_once(model_folder, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["chat", "hi", "--model", str(model_folder), "-o", str(tmp_path / "file" / "x")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_the_conversation_is_unchanged_after_an_error(tiny_mllm):
    model, processor = tiny_mllm
    session = ChatSession()
    list(session.ask(model, processor, "a ring", [], TALK, seed=0))
    before = list(session.messages)
    for text in ("  ", "ring " * 40000):
        with pytest.raises(UserError):
            list(session.ask(model, processor, text, [], TALK, seed=0))
        assert session.messages == before


def test_a_stopped_answer_is_added_up_to_its_stop(tiny_mllm):
    model, processor = tiny_mllm
    session = ChatSession()
    events = session.ask(model, processor, "a ring", [], AnswerOptions(max_new_tokens=200, max_images=0), seed=0)
    heard = next(event.text for event in events if isinstance(event, TextDelta))
    events.close()
    assert session.messages[-1] == {"role": "assistant", "content": [{"type": "text", "text": heard}]}


# In the terminal -------------------------------------------------------------------------------------------------


def test_a_drawn_image_is_saved_and_shown_as_a_path(chat, tmp_path):
    out, _ = chat(["/draw a photo of a ring", "/draw a photo of a ring"], "--seed", 5)
    paths = [tmp_path / "drawn" / f"a_photo_of_a_ring_seed{seed}.png" for seed in (5, 6)]
    assert out.splitlines() == [f"[image: {path}]" for path in paths]
    text = Image.open(paths[1]).text
    assert (text["prompt"], text["seed"]) == ("a photo of a ring", "6") and json.loads(text["settings"])["turn"] == 2
    assert Image.open(paths[1]).size == (288, 288) and text["scale"] == "6"
    (path,) = (line[8:-1] for line in chat(["/draw a photo of a ring"], "--seed", 5, "--scale", 1).out.splitlines())
    assert Image.open(path).size == (48, 48) and path.endswith("seed5_2.png")


def test_a_conversation_is_saved_with_its_images(chat, picture, tmp_path):
    out, _ = chat([f"/image {picture}", "What is it?", "/draw a ring", f"/save {tmp_path / 'kept'}"])
    messages = json.loads((tmp_path / "kept" / "conversation.json").read_text())
    assert out.splitlines()[-1] == str(tmp_path / "kept") and [m["role"] for m in messages] == ["user", "assistant"] * 2
    assert messages[0]["content"] == [{"type": "image", "image": "image1.png"}, {"type": "text", "text": "What is it?"}]
    assert messages[3]["content"] == [{"type": "image", "image": "image2.png"}]
    assert Image.open(tmp_path / "kept" / "image1.png").getpixel((0, 0)) == (255, 0, 0)


def test_saving_never_overwrites_files(chat, tmp_path):
    (tmp_path / "mine.txt").write_text("dear")
    _, error = chat(["/draw a ring", f"/save {tmp_path}"])
    assert "not empty" in error and (tmp_path / "mine.txt").read_text() == "dear"


def test_reset_starts_a_new_conversation(chat, tmp_path):
    chat(["/draw a ring", "/reset", f"/save {tmp_path / 'kept'}"])
    assert json.loads((tmp_path / "kept" / "conversation.json").read_text()) == []


def test_an_image_without_a_question_is_kept_for_the_next_one(chat, picture, tmp_path):
    _, error = chat([f"'{picture}'", "What is it?", f"/save {tmp_path / 'kept'}"])
    assert "1 image for the next question" in error and (tmp_path / "kept" / "image1.png").is_file()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/dance", "unknown command /dance; /help"),
        ("/image", "/image needs an argument"),
        ("/image absent.png", "image 'absent.png' does not exist"),
        ("what is in there/absent.png ?", "image 'there/absent.png' does not exist"),
        (f"what is in there/{'a' * 300}.png ?", ".png' does not exist"),
        ("what is https://example.com/cat.png ?", "is not fetched; save the image and give its path\n"),
    ],
)
def test_the_conversation_continues_after_bad_input(chat, line, message, tmp_path):
    _, error = chat([line, "/draw a ring", "/quit", "/draw never"])
    assert "error: " in error and message in error
    assert [path.name for path in (tmp_path / "drawn").iterdir()] == ["a_ring_seed0.png"]


def test_input_that_is_not_text_is_reported(model_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8"))
    assert main(["chat", "--model", str(model_folder), "-o", str(tmp_path)]) == 2
    assert capsys.readouterr().err.endswith("error: the input is not text in utf-8: invalid start byte\n")


def test_a_single_question_can_contain_image_paths(model_folder, picture, capsys):
    arguments = ["chat", f'What is in "{picture}"?', "--model", str(model_folder), "--max_new_tokens", "3"]
    assert main(arguments) == 0 and capsys.readouterr().out.endswith("\n")


# Images in a line ------------------------------------------------------------------------------------------------


def test_paths_in_a_line_are_recognized(picture, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("dog.JPG")
    plain, escaped, url = "dog.JPG", str(picture).replace(" ", "\\ "), picture.as_uri()
    for line, text, count in [
        (f"What's in {plain}?", "What's in ?", 1),
        (f'compare "{picture}" and {plain}, please', "compare and , please", 2),
        (f"{escaped} what is it", "what is it", 1),
        (f"{url} what is it", "what is it", 1),
        ("write it as ring.png", "write it as ring.png", 0),
        ("what is a .png?", "what is a .png?", 0),
        (f"{'a' * 300}.png", f"{'a' * 300}.png", 0),
    ]:
        found = extract_images(line)
        assert (found[0], len(found[1])) == (text, count), line


def test_a_file_url_of_another_host_is_rejected(picture):
    with pytest.raises(UserError, match="only local files are read"):
        open_chat_image(f"file://server{picture}")


def test_the_best_candidate_of_a_drawing_is_kept(chat, tmp_path):
    chat(["/draw a photo of a ring"], "--best_of", 3)
    (path,) = (tmp_path / "drawn").iterdir()
    settings = json.loads(Image.open(path).text["settings"])
    assert (settings["best_of"], settings["judge"]) == (3, "reading") and settings["candidate"] in (0, 1, 2)
