import http.server
import io
import json
import threading

import numpy as np
import pytest
from PIL import Image

from llava_ext.cli import main
from llava_ext.commands.chat import Pictures
from llava_ext.generation import ImageDrawn, TextDelta
from llava_ext.generation.interleaved import AnswerOptions
from llava_ext.serving import web_images
from llava_ext.serving.session import ChatSession

DRAW = AnswerOptions(image_first=True)
TALK = AnswerOptions(max_new_tokens=4, max_images=0)


@pytest.fixture
def picture(tmp_path):
    """A red image of 60 x 40 pixels as a file whose name holds a space."""
    path = tmp_path / "my cat.png"
    Image.new("RGB", (60, 40), "red").save(path)
    return path


@pytest.fixture
def chat(model_folder, tmp_path, capsys, monkeypatch):
    """`chat(lines, *flags)` types lines into the command; gives what it wrote to stdout and stderr."""

    def run(lines, *flags):
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(map(str, lines)) + "\n"))
        flags = [*map(str, flags), "--max_new_tokens", "4", "-o", str(tmp_path / "drawn")]
        assert main(["chat", "--model", str(model_folder), *flags]) == 0
        return capsys.readouterr()

    return run


# A conversation --------------------------------------------------------------------------------------------------


def test_an_image_it_drew_can_be_asked_about(tiny_mllm):
    model, processor = tiny_mllm
    conversation = ChatSession()
    events = list(conversation.ask(model, processor, "a photo of a ring", [], DRAW, seed=3))
    (drawn,) = [event.image for event in events if isinstance(event, ImageDrawn)]
    list(conversation.ask(model, processor, "What shape is it?", [], TALK, seed=4))
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * 2
    inputs = processor.apply_chat_template(conversation.messages, tokenize=True)
    np.testing.assert_array_equal(inputs["pixel_values"], processor.image_processor(drawn).pixel_values)


def test_the_history_is_part_of_the_question(tiny_mllm, monkeypatch):
    model, processor = tiny_mllm
    seen, stream = [], type(model).stream

    def watched(model, inputs, *arguments):
        seen.append(processor.decode(inputs["input_ids"][0]))
        return stream(model, inputs, *arguments)

    monkeypatch.setattr(type(model), "stream", watched)
    conversation = ChatSession()
    for text in ("red circles", "blue squares"):
        list(conversation.ask(model, processor, text, [], TALK, seed=0))
    assert "red circles" in seen[1] and seen[1].index("red circles") < seen[1].index("blue squares")


def test_what_a_model_writes_never_stands_for_an_image(tiny_mllm, monkeypatch):
    model, processor = tiny_mllm
    said = [TextDelta(0, "an <ima"), TextDelta(0, "ge> and <|image_pad|>")]
    monkeypatch.setattr(type(model), "stream", lambda *arguments: iter(said))
    conversation = ChatSession()
    list(conversation.ask(model, processor, "hi", [], TALK, seed=0))
    inputs = processor.apply_chat_template(conversation.messages, tokenize=True)
    assert "pixel_values" not in inputs and processor.image_token_id not in inputs["input_ids"]
    assert "an <image> and <|image_pad|>" in processor.decode(inputs["input_ids"][0])


def test_an_image_that_cannot_be_written_leaves_the_conversation_as_it_was(chat, tmp_path, monkeypatch):
    from llava_ext.commands import chat as command

    def full(*arguments):
        raise ValueError("disk full")

    monkeypatch.setattr(command, "write_drawn", full)
    written = chat(["/draw a ring", f"/save {tmp_path / 'saved'}"])
    assert "disk full" in written.err
    assert json.loads((tmp_path / "saved" / "conversation.json").read_text()) == []


def test_a_folder_that_cannot_be_written_to_is_named_at_once(model_folder, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["chat", "hi", "--model", str(model_folder), "-o", str(tmp_path / "file" / "x")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_after_an_error_the_conversation_is_as_before(tiny_mllm):
    model, processor = tiny_mllm
    conversation = ChatSession()
    list(conversation.ask(model, processor, "a ring", [], TALK, seed=0))
    before = list(conversation.messages)
    for text in ("  ", "ring " * 40000):
        with pytest.raises(ValueError):
            list(conversation.ask(model, processor, text, [], TALK, seed=0))
        assert conversation.messages == before


def test_an_answer_that_is_left_joins_as_far_as_it_came(tiny_mllm):
    model, processor = tiny_mllm
    conversation = ChatSession()
    events = conversation.ask(model, processor, "a ring", [], AnswerOptions(max_new_tokens=200, max_images=0), seed=0)
    heard = next(event.text for event in events if isinstance(event, TextDelta))
    events.close()
    assert conversation.messages[-1] == {"role": "assistant", "content": [{"type": "text", "text": heard}]}


# In the terminal -------------------------------------------------------------------------------------------------


def test_a_drawn_image_is_saved_and_shown_as_a_path(chat, tmp_path):
    out, _ = chat(["/draw a photo of a ring", "/draw a photo of a ring"], "--seed", 5)
    paths = [tmp_path / "drawn" / f"a_photo_of_a_ring_seed{seed}.png" for seed in (5, 6)]
    assert out.splitlines() == [f"[image: {path}]" for path in paths]
    text = Image.open(paths[1]).text
    assert (text["prompt"], text["seed"]) == ("a photo of a ring", "6") and json.loads(text["settings"])["turn"] == 2


def test_a_conversation_is_saved_with_its_images(chat, picture, tmp_path):
    out, _ = chat([f"/image {picture}", "What is it?", "/draw a ring", f"/save {tmp_path / 'kept'}"])
    messages = json.loads((tmp_path / "kept" / "conversation.json").read_text())
    assert out.splitlines()[-1] == str(tmp_path / "kept") and [m["role"] for m in messages] == ["user", "assistant"] * 2
    assert messages[0]["content"] == [{"type": "image", "image": "image1.png"}, {"type": "text", "text": "What is it?"}]
    assert messages[3]["content"] == [{"type": "image", "image": "image2.png"}]
    assert Image.open(tmp_path / "kept" / "image1.png").getpixel((0, 0)) == (255, 0, 0)


def test_saving_overwrites_nothing(chat, tmp_path):
    (tmp_path / "mine.txt").write_text("dear")
    _, error = chat(["/draw a ring", f"/save {tmp_path}"])
    assert "not empty" in error and (tmp_path / "mine.txt").read_text() == "dear"


def test_reset_begins_anew(chat, tmp_path):
    chat(["/draw a ring", "/reset", f"/save {tmp_path / 'kept'}"])
    assert json.loads((tmp_path / "kept" / "conversation.json").read_text()) == []


def test_an_image_alone_waits_for_its_question(chat, picture, tmp_path):
    _, error = chat([f"'{picture}'", "What is it?", f"/save {tmp_path / 'kept'}"])
    assert "1 image for the next question" in error and (tmp_path / "kept" / "image1.png").is_file()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/dance", "unknown command /dance; /help"),
        ("/image", "/image what?"),
        ("/image absent.png", "image 'absent.png' does not exist"),
        ("what is in there/absent.png ?", "image 'there/absent.png' does not exist"),
        ("what is https://example.com/cat.png ?", "is not fetched; save the image and give its path"),
    ],
)
def test_after_bad_input_the_conversation_goes_on(chat, line, message, tmp_path):
    _, error = chat([line, "/draw a ring", "/quit", "/draw never"])
    assert "error: " in error and message in error
    assert [path.name for path in (tmp_path / "drawn").iterdir()] == ["a_ring_seed0.png"]


def test_one_question_takes_its_images_from_the_line_too(model_folder, picture, capsys):
    arguments = ["chat", f'What is in "{picture}"?', "--model", str(model_folder), "--max_new_tokens", "3"]
    assert main(arguments) == 0 and capsys.readouterr().out.endswith("\n")


# Images in a line ------------------------------------------------------------------------------------------------


def test_paths_in_a_line_are_recognised(picture, tmp_path, monkeypatch):
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
    ]:
        found = Pictures(allow_urls=False).in_line(line)
        assert (found[0], len(found[1])) == (text, count), line


def test_a_file_of_another_host_is_not_looked_for_here(picture):
    with pytest.raises(ValueError, match="only local files are read"):
        Pictures(allow_urls=False).open(f"file://server{picture}")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1/a.png", "127.0.0.1, which is no public address"),
        ("http://localhost:1/a.png", "no public address"),
        ("http://[::1]/a.png", "no public address"),
        ("http://[::ffff:10.0.0.1]/a.png", "no public address"),
        ("http://169.254.169.254/latest/meta-data", "no public address"),
        ("http://192.168.1.1/a.png", "no public address"),
        ("http://0/a.png", "no public address"),
        ("http://[/a.png", "is no URL"),
        ("file:///etc/passwd", "expected http:// or https://"),
        ("ftp://example.com/a.png", "expected http:// or https://"),
    ],
)
def test_no_address_but_a_public_one_is_fetched(url, message):
    with pytest.raises(ValueError, match=message):
        web_images.fetch(url, 1000)


@pytest.fixture
def site(monkeypatch):
    """A server that passes for public by the name `images.test`."""
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20), "blue").save(buffer, "PNG")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            here = f"http://images.test:{self.server.server_address[1]}"
            moved = {"/moved": f"{here}/cat.png", "/inside": "http://127.0.0.1/a.png", "/round": "/round"}
            self.send_response(302 if self.path in moved else 200 if self.path in ("/cat.png", "/page") else 404)
            if self.path in moved:
                self.send_header("Location", moved[self.path])
            self.end_headers()
            self.wfile.write(buffer.getvalue() if self.path == "/cat.png" else b"<html>")

        def log_message(self, *arguments):
            pass

    checked = web_images._public_address
    monkeypatch.setattr(
        web_images, "_public_address", lambda h, p: "127.0.0.1" if h == "images.test" else checked(h, p)
    )
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://images.test:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_images_of_the_web_are_read_where_that_is_allowed(site):
    for path in ("/cat.png", "/moved"):
        text, images = Pictures(allow_urls=True).in_line(f"What is {site}{path}, pray?")
        assert images[0].getpixel((0, 0)) == (0, 0, 255) and text == "What is , pray?"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/inside", "127.0.0.1, which is no public address"),
        ("/round", "more than 3 redirects"),
        ("/nothing", "404"),
        ("/page", "broken, or none of PNG"),
    ],
)
def test_what_the_web_gives_is_checked(site, path, message):
    with pytest.raises(ValueError, match=message):
        Pictures(allow_urls=True).open(site + path)


def test_no_more_is_fetched_than_allowed(site):
    with pytest.raises(ValueError, match="/cat.png has more than the"):
        web_images.fetch(f"{site}/cat.png", 20)
