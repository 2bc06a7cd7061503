"""The web page without a browser: the introduction, examples, several images at once, drawing again, and its states."""

import json
import socket

import numpy as np
import pytest
from PIL import Image

gradio = pytest.importorskip("gradio", reason="the page needs gradio: pip install 'evotok[demo]'")

import gradio_client  # noqa: E402
from gradio_client.exceptions import AppError  # noqa: E402

from llava_ext.generation import ImageDrawn, ImageStarted, TextDelta  # noqa: E402
from llava_ext.model_folder import OpenModel  # noqa: E402
from llava_ext.serving.answer_batches import AnswerBatches  # noqa: E402
from llava_ext.serving.handlers import DemoLimits, LastDrawing, PageChat  # noqa: E402
from llava_ext.serving.introduction import Example, Introduction  # noqa: E402
from llava_ext.serving.page import build_demo, launch_demo  # noqa: E402

ANY = "text or images, as the model sees fit"
SETTINGS = {"answer": "an image", "tokens": 8, "guidance": 1.0, "schedule": "constant"}
SETTINGS |= {"start": 0.0, "end": 1.0, "rescale": 0.0, "negative": "", "seed": 0}
SETTINGS |= {"candidates": 1, "drawings": 1, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8))
INTRODUCTION = Introduction("rings, <b>and</b> more", (Example("a photo of a ring"), Example("What is it?", PICTURE)))


@pytest.fixture(scope="module")
def demo(tiny_mllm, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("files")))
        demo = build_demo(OpenModel(*tiny_mllm, "tiny", "fingerprint"), DemoLimits(), introduction=INTRODUCTION)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        demo.address = launch_demo(demo, port=port, wait=False)
        yield demo
        demo.close()


@pytest.fixture
def connect(demo):
    """`connect()` returns a function that runs a handler in a new conversation and returns the conversation shown."""

    def new():
        client = gradio_client.Client(demo.address, verbose=False)

        def run(name, text=None, files=(), **settings):
            values = list((SETTINGS | settings).values())
            if name == "ask":
                files = [gradio_client.handle_file(file) for file in files]
                return client.predict({"text": text, "files": files}, *values, api_name="/ask")[1]
            return client.predict(*values, api_name=f"/{name}")

        return run

    return new


@pytest.fixture
def run(connect):
    return connect()


def drawn(message):
    return [Image.open(part["file"]) for part in message["content"] if part["type"] == "file"]


def seeds(message):
    return [int(image.text["seed"]) for image in drawn(message)]


def texts(message):
    return [part["text"] for part in message["content"] if part["type"] == "text"]


def pixels(image):
    return np.asarray(image).astype(int)


# What the page shows ---------------------------------------------------------------------------------------------


def component(demo, elem_id):
    (found,) = [block for block in demo.blocks.values() if getattr(block, "elem_id", None) == elem_id]
    return found


def labels(demo, kind):
    return [block for block in demo.blocks.values() if isinstance(block, kind)]


def test_the_line_of_the_card_is_shown_as_plain_text(demo):
    assert component(demo, "knows").value == "What it knows: rings, &lt;b&gt;and&lt;/b&gt; more"


def test_a_model_without_an_introduction_shows_neither_line_nor_examples(tiny_mllm):
    plain = build_demo(OpenModel(*tiny_mllm, "tiny", "fingerprint"))
    ids = {getattr(block, "elem_id", None) for block in plain.blocks.values()}
    assert "message" in ids and not ids & {"knows", "examples"}
    assert not [fn for fn in plain.fns.values() if str(fn.api_name).startswith("example")]


def test_examples_are_buttons(demo):
    chips = [button for button in labels(demo, gradio.Button) if "example" in button.elem_classes]
    assert [chip.value for chip in chips] == ["a photo of a ring", "What is it? (with an image)"]
    assert all(chip.parent is component(demo, "examples") for chip in chips)


def test_sampling_settings_are_closed_at_first(demo):
    accordions = {block.label: block for block in labels(demo, gradio.Accordion)}
    assert set(accordions) == {"Sampling of images", "Guidance"} and not any(a.open for a in accordions.values())
    inside = {block.label: block.parent for block in demo.blocks.values() if getattr(block, "label", None)}
    for name in ("Temperature", "Top-k", "Top-p", "Min-p"):
        assert accordions["Sampling of images"] in (inside[name], inside[name].parent)


def updates(demo, trigger, event, *arguments):
    """Changes by the first function after an event, by elem_id."""
    target = (component(demo, trigger)._id, event)
    (function,) = [fn for fn in demo.fns.values() if target in fn.targets]
    return function, {
        output.elem_id or output.value: update
        for output, update in zip(function.outputs, function.fn(*arguments), strict=True)
    }


def test_stop_is_shown_only_while_an_answer_is_generated(demo):
    stop = component(demo, "stop")
    assert not stop.visible
    begun, changes = updates(demo, "message", "submit")
    assert changes["stop"]["visible"] and not changes["message"]["interactive"] and not changes["redraw"]["interactive"]
    assert not changes["a photo of a ring"]["interactive"]
    (ask,) = [fn for fn in demo.fns.values() if fn.trigger_after == begun._id]
    ends = [fn for fn in demo.fns.values() if fn.trigger_after == ask._id]
    assert {(fn.trigger_only_on_success, fn.trigger_only_on_failure) for fn in ends} == {(True, False), (False, True)}
    for end in ends:
        assert end.outputs[0] is stop
        hidden, message, *_, redraw = end.fn(PageChat())
        assert not hidden["visible"] and message["interactive"] and not redraw["interactive"]
        assert end.fn(PageChat(last_drawing=LastDrawing(None, {})))[-1]["interactive"]


# Examples --------------------------------------------------------------------------------------------------------


def test_an_example_is_answered_like_a_typed_message(run, connect):
    question, answer = run("example_1", seed=3)
    assert texts(question) == ["a photo of a ring"] and seeds(answer) == [3]
    typed = connect()("ask", "a photo of a ring", seed=3)
    np.testing.assert_array_equal(pixels(drawn(answer)[0]), pixels(drawn(typed[-1])[0]))


def test_an_example_with_an_image_shows_it_and_can_be_used_again(run):
    for count in (1, 2):
        shown = run("example_2", answer=ANY)
        assert len(shown) == 2 * count and texts(shown[-2]) == ["What is it?"]
        np.testing.assert_array_equal(pixels(drawn(shown[-2])[0]), pixels(PICTURE))


# Several images --------------------------------------------------------------------------------------------------


def test_several_uploads_are_read_in_one_message(run, tmp_path):
    for name, color in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (60, 40), color).save(tmp_path / name)
    question, answer = run("ask", "Which is red?", [tmp_path / "a.png", tmp_path / "b.png"], answer=ANY)
    assert [image.getpixel((5, 5)) for image in drawn(question)] == [(255, 0, 0), (0, 0, 255)]
    assert texts(question) == ["Which is red?"] and answer["content"]


def test_several_drawings_are_the_drawings_of_their_seeds(run, connect):
    shown = run("ask", "a photo of a ring", drawings=3, seed=5)
    assert seeds(shown[-1]) == [5, 6, 7]
    for seed, image in zip((5, 6, 7), drawn(shown[-1]), strict=True):
        alone = drawn(connect()("ask", "a photo of a ring", seed=seed)[-1])[0]
        np.testing.assert_allclose(pixels(image), pixels(alone), atol=1)  # sums round differently in another batch
    assert seeds(run("ask", "a photo of a cross", seed=5)[-1]) == [8]  # the conversation goes on after them


def test_every_drawing_is_the_best_of_its_candidates(run):
    images = drawn(run("ask", "a photo of a ring", drawings=2, candidates=3)[-1])
    assert [json.loads(image.text["settings"])["best_of"] for image in images] == [3, 3]
    assert [int(image.text["seed"]) for image in images] == [0, 1]
    with pytest.raises(AppError, match="4 drawings with 5 candidates each are 20 images, more than the 16"):
        run("ask", "a photo of a ring", drawings=4, candidates=5)


def test_an_answer_of_the_model_may_have_several_drawings(run, monkeypatch):
    def stream(self, *arguments, **options):
        yield TextDelta(0, "one")
        for number, color in enumerate(("red", "blue")):
            yield ImageStarted(0, number)
            yield ImageDrawn(0, number, Image.new("RGB", (48, 48), color), None)
            yield TextDelta(0, f"after {color}")

    monkeypatch.setattr(AnswerBatches, "stream", stream)
    answer = run("ask", "two images", answer=ANY)[-1]
    assert [part["type"] for part in answer["content"]] == ["text", "file", "text", "file", "text"]
    assert texts(answer) == ["one", "after red", "after blue"] and seeds(answer) == [0, 1]
    assert [image.getpixel((9, 9)) for image in drawn(answer)] == [(255, 0, 0), (0, 0, 255)]


# Drawing again ---------------------------------------------------------------------------------------------------


def test_the_last_drawing_is_drawn_again_with_another_seed(run, connect):
    first = run("ask", "a photo of a ring", seed=7)
    run("ask", "What is it?", seed=7, answer=ANY)
    shown = run("redraw", seed=7, answer=ANY)
    assert len(shown) == 6 and texts(shown[-2]) == ["a photo of a ring"] and seeds(shown[-1]) == [9]
    again = pixels(drawn(shown[-1])[0])
    assert (again != pixels(drawn(first[-1])[0])).any()
    alone = drawn(connect()("ask", "a photo of a ring", seed=9)[-1])[0]  # the question in between has no influence
    np.testing.assert_array_equal(again, pixels(alone))
    assert seeds(run("redraw", seed=7)[-1]) == [10] and len(run("redraw", seed=7, drawings=2)[-1]["content"]) == 2


def test_drawing_again_uses_no_seed_twice(run):
    assert seeds(run("ask", "a photo of a ring", seed=5)[-1]) == [5]
    assert seeds(run("redraw", seed=4)[-1]) == [6]  # the second answer of seed 4 would have seed 5
    assert seeds(run("redraw", seed=3, drawings=2)[-1]) == [7, 8]


def test_drawing_again_reads_the_same_uploads(run, tmp_path):
    Image.new("RGB", (60, 40), "red").save(tmp_path / "a.png")
    run("ask", "Draw it again.", [tmp_path / "a.png"])
    question = run("redraw")[-2]
    assert drawn(question)[0].getpixel((5, 5)) == (255, 0, 0) and texts(question) == ["Draw it again."]


def test_without_a_drawing_nothing_can_be_drawn_again(run):
    with pytest.raises(AppError, match="nothing was drawn in this conversation yet"):
        run("redraw")
    run("ask", "a photo of a ring")
    assert run("redraw")[-1]["role"] == "assistant"
