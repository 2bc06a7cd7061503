"""Answers in progress as the page shows them: files of images, and rows that are stopped."""

import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the page needs gradio: pip install 'evotok[demo]'")

from llava_ext.generation import ImageDrawn, ImagePreview, ImageStarted, TextDelta  # noqa: E402
from llava_ext.serving.image_files import Provenance  # noqa: E402
from llava_ext.serving.shown_answer import ShownAnswer, image_part  # noqa: E402


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))


@pytest.fixture
def answer():
    return ShownAnswer(lambda drawn: Provenance("a ring", 5 + drawn.row, "tiny", {}, "fingerprint"))


def picture(color):
    return Image.new("RGB", (8, 8), color)


def test_a_shown_file_is_never_written_again():
    """The browser may be loading it."""
    paths = [image_part(picture("red"))["path"] for _ in range(2)]
    assert paths[0] != paths[1] and all(Image.open(path).getpixel((0, 0)) == (255, 0, 0) for path in paths)


def test_rows_are_shown_in_their_order_whichever_is_first(answer):
    for row in (1, 0):
        answer.add(ImageStarted(row, 0))
    answer.add(ImagePreview(1, 0, picture("gray"), 1, 2))
    answer.add(ImageDrawn(1, 0, picture("blue"), None))
    assert answer.content[0] == {"type": "text", "text": "drawing ..."}
    answer.add(ImageDrawn(0, 0, picture("red"), None))
    images = [Image.open(part["path"]) for part in answer.content]
    assert [image.getpixel((0, 0)) for image in images] == [(255, 0, 0), (0, 0, 255)]
    assert [image.text["seed"] for image in images] == ["5", "6"]


def test_a_stopped_answer_keeps_its_finished_images_only(answer):
    for row in (0, 1, 2):
        answer.add(ImageStarted(row, 0))
    answer.add(ImagePreview(0, 0, picture("gray"), 1, 2))
    answer.add(ImageDrawn(2, 0, picture("blue"), None))
    answer.end()
    (part,) = answer.content
    assert Image.open(part["path"]).getpixel((0, 0)) == (0, 0, 255)


def test_an_answer_without_anything_says_so(answer):
    answer.add(ImageStarted(0, 0))
    answer.end()
    assert answer.content == [{"type": "text", "text": "(no answer)"}]
    answer.add(TextDelta(0, "!"))
    assert answer.content == [{"type": "text", "text": "(no answer)!"}]


def test_text_is_escaped_because_the_page_renders_html(answer):
    answer.add(TextDelta(0, "1 < 2 & <im"))
    answer.add(TextDelta(0, "age>"))
    assert answer.content == [{"type": "text", "text": "1 &lt; 2 &amp; &lt;image&gt;"}]
