"""The web page in a real browser without network access: upload, ask, draw, rebuild, errors, phones and dark mode.

To run it: `pip install 'evotok[demo,test]'`, `apt-get install chromium`, and
`python -m pytest tests/llava_ext/serving/test_page_in_browser.py`.
"""

import io
import shutil
import socket
import time

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the page needs gradio: pip install 'evotok[demo]'")
sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")

from llava_ext.generation import TextDelta  # noqa: E402
from llava_ext.generation.answers import Answers  # noqa: E402
from llava_ext.model_folder import OpenModel  # noqa: E402
from llava_ext.serving.handlers import DemoLimits  # noqa: E402
from llava_ext.serving.introduction import Example, Introduction  # noqa: E402
from llava_ext.serving.page import build_demo, launch_demo  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium found: apt-get install chromium")


@pytest.fixture(scope="module")
def address(tiny_mllm):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    examples = tuple(Example(f"a photo of {number} rings") for number in range(1, 7))
    introduction = Introduction("rings, <b>and</b> more", examples)
    demo = build_demo(OpenModel(*tiny_mllm, "tiny", ""), DemoLimits(max_new_tokens=16), introduction=introduction)
    yield launch_demo(demo, port=port, wait=False)
    demo.close()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, address):
    """`open_page(width, **options)` opens the page; the test fails if it requests anything from another server."""
    pages, asked = [], []

    def run(width, **options):
        page = browser.new_page(viewport={"width": width, "height": 900}, **options)
        pages.append(page)
        page.set_default_timeout(120_000)
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        page.wait_for_selector("#message textarea")
        return page

    yield run
    for page in pages:
        page.close()
    assert asked and not [url for url in asked if not url.startswith((address, "data:", "blob:"))]


@pytest.fixture
def page(open_page):
    return open_page(1200)


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "scene.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(path)
    return path


def attach(page, where, *paths):
    with page.expect_response(lambda response: "/upload?" in response.url):
        page.set_input_files(f"{where} input[type=file]", paths)


def say(page, text):
    page.fill("#message textarea", text)
    page.press("#message textarea", "Enter")


def enter(page, label, value):
    """Fill a field until it keeps the value: gradio sets the initial value of a field in a panel after it is shown."""
    field, deadline = page.get_by_label(label, exact=True), time.monotonic() + 60
    while field.input_value() != value:
        assert time.monotonic() < deadline, f"the field {label!r} does not keep {value!r}"
        field.fill(value)
        field.press("Tab")
        page.wait_for_timeout(1000)


def loaded(page, images, count=1):
    """Wait until `count` images are loaded."""
    page.wait_for_function(
        "([images, count]) => [...document.querySelectorAll(images)].filter(i => i.naturalWidth > 0).length >= count",
        arg=[images, count],
    )


def test_an_upload_is_read_and_an_image_drawn(page, picture):
    attach(page, "#message", picture)
    say(page, "What is in the <image> & <b>below</b>?")
    loaded(page, "#conversation .user img")
    page.locator("#conversation .user", has_text="What is in the <image> & <b>below</b>?").wait_for()
    page.wait_for_selector("#conversation .bot")
    page.get_by_label("an image", exact=True).check()
    say(page, "a photo of a ring")
    loaded(page, "#conversation .bot img")
    assert page.locator("#message textarea").input_value() == ""


def test_an_image_is_rebuilt_level_by_level(page, picture):
    page.get_by_role("tab", name="Evolution").click()
    attach(page, "#evolving", picture)
    page.click("#rebuild")
    loaded(page, "#levels .thumbnail-item img", count=9)
    loaded(page, "#curves img")
    assert page.locator("#levels .caption-label").all_inner_texts()[1].startswith("1 level: ")


def test_errors_are_shown_and_the_page_keeps_working(page, tmp_path):
    page.get_by_role("button", name="Guidance").click()
    enter(page, "Guidance scale", "0.5")
    say(page, "a <b>bold</b> ring")
    error = page.locator("[data-testid=toast-body]", has_text="guidance_scale must be at least 1")
    error.wait_for()
    assert page.locator("#message textarea").input_value() == "a <b>bold</b> ring"  # the message is kept
    enter(page, "Guidance scale", "2")
    enter(page, "Seed", "-5")
    say(page, "a ring")
    page.locator("[data-testid=toast-body]", has_text="the seed must be between 0").wait_for()
    enter(page, "Seed", "0")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    attach(page, "#message", tmp_path / "broken.png")
    say(page, "What is it?")
    page.locator("[data-testid=toast-body]", has_text="image 'broken.png' cannot be read").wait_for()
    page.get_by_role("tab", name="Evolution").click()
    page.click("#rebuild")
    page.locator("[data-testid=toast-body]", has_text="no image; upload one first").wait_for()
    page.reload()
    page.get_by_label("an image", exact=True).check()
    say(page, "a ring")
    loaded(page, "#conversation .bot img")


def test_an_example_is_one_click_and_is_drawn_again(page):
    assert page.locator("#knows").inner_text() == "What it knows: rings, <b>and</b> more"
    page.fill("#message textarea", "a draft")
    page.get_by_label("an image", exact=True).check()
    assert page.get_by_role("button", name="Draw again").is_disabled()
    page.get_by_role("button", name="a photo of 2 rings").click()
    loaded(page, "#conversation .bot img")
    assert page.locator("#message textarea").input_value() == "a draft"
    page.locator("#redraw:enabled").click()
    loaded(page, "#conversation .bot img", count=2)
    sources = page.evaluate("[...document.querySelectorAll('#conversation .bot img')].map(image => image.src)")
    assert len(set(sources)) == 2


def test_several_images_are_uploaded_and_drawn_at_once(page, picture, tmp_path):
    other = tmp_path / "other.png"
    Image.new("RGB", (40, 40), "red").save(other)
    attach(page, "#message", picture, other)
    page.get_by_label("an image", exact=True).check()
    enter(page, "number input for Drawings", "3")
    say(page, "Draw them again.")
    loaded(page, "#conversation .user img", count=2)
    loaded(page, "#conversation .bot img", count=3)


def test_stop_is_shown_only_while_an_answer_is_generated(page, monkeypatch):
    def slowly(self):  # until the answer is stopped
        time.sleep(0.02)
        yield from [TextDelta(row.number, " word") for row in self._rows if not row.done]

    monkeypatch.setattr(Answers, "step", slowly)
    stop = page.locator("#stop")
    assert not stop.is_visible()
    say(page, "count")
    page.locator("#conversation .bot", has_text="word").wait_for()
    assert stop.is_visible() and page.locator("#redraw").is_disabled()
    assert page.locator("#examples button:enabled").count() == 0
    stop.click()
    stop.wait_for(state="hidden")
    page.locator("#message textarea:enabled").wait_for()
    assert page.locator("#examples button:enabled").count() == 6


def test_the_settings_of_images_are_closed_at_first(page):
    for name, panel in (("Top-k", "Sampling of images"), ("Guidance scale", "Guidance")):
        setting = page.get_by_label(name, exact=True)
        assert not setting.is_visible()
        page.get_by_role("button", name=panel).click()
        setting.wait_for()


def test_all_levels_are_visible_on_a_phone(open_page, picture):
    page = open_page(390)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.get_by_role("tab", name="Evolution").click()
    attach(page, "#evolving", picture)
    page.click("#rebuild")
    loaded(page, "#levels .thumbnail-item img", count=9)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    boxes = page.evaluate(
        "[...document.querySelectorAll('#levels .caption-label')].map(one => one.getBoundingClientRect().toJSON())"
    )
    frame = page.locator("#levels").bounding_box()
    assert len(boxes) == 9
    for box in boxes:
        assert 0 <= box["left"] and box["right"] <= 390 and box["bottom"] <= frame["y"] + frame["height"]
    scrolled = "[...document.querySelectorAll('#levels *')].filter(one => one.scrollHeight > one.clientHeight + 1"
    scrolled += " && getComputedStyle(one).overflowY != 'visible' && !one.closest('button')).length"
    assert page.evaluate(scrolled) == 0  # nothing is hidden behind a scroll bar


@pytest.mark.parametrize(("mode", "shown", "hidden"), [("light", "#curves", "#dark_curves"),
                                                       ("dark", "#dark_curves", "#curves")])  # fmt: skip
def test_the_plot_suits_the_page(open_page, picture, mode, shown, hidden):
    page = open_page(1200, color_scheme=mode)
    page.get_by_role("tab", name="Evolution").click()
    attach(page, "#evolving", picture)
    page.click("#rebuild")
    loaded(page, f"{shown} img")
    assert page.locator(f"{shown} img").is_visible() and not page.locator(hidden).is_visible()
    plot = Image.open(io.BytesIO(page.locator(f"{shown} img").screenshot())).convert("L")
    assert (np.median(plot) < 64) == (mode == "dark")
