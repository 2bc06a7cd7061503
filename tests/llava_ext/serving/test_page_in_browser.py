"""The web page in a real browser without network access: upload, ask, draw, rebuild, and errors.

To run it: `pip install 'evotok[demo,test]'`, `apt-get install chromium`, and
`python -m pytest tests/llava_ext/serving/test_page_in_browser.py`.
"""

import shutil
import socket

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the page needs gradio: pip install 'evotok[demo]'")
sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")

from llava_ext.model_folder import OpenModel  # noqa: E402
from llava_ext.serving.handlers import DemoLimits  # noqa: E402
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
    demo = build_demo(OpenModel(*tiny_mllm, "tiny", ""), DemoLimits(max_new_tokens=16))
    yield launch_demo(demo, port=port, wait=False)
    demo.close()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address):
    """The page; the test fails if it requests anything from another server."""
    page, asked = browser.new_page(viewport={"width": 1200, "height": 900}), []
    page.set_default_timeout(120_000)
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    page.wait_for_selector("#message textarea")
    yield page
    page.close()
    assert asked and not [url for url in asked if not url.startswith((address, "data:", "blob:"))]


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "scene.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(path)
    return path


def attach(page, where, path):
    with page.expect_response(lambda response: "/upload?" in response.url):
        page.set_input_files(f"{where} input[type=file]", path)


def say(page, text):
    page.fill("#message textarea", text)
    page.press("#message textarea", "Enter")


def loaded(page, images, count=1):
    """Wait until `count` images are loaded."""
    page.wait_for_function(
        "([images, count]) => [...document.querySelectorAll(images)].filter(i => i.naturalWidth > 0).length >= count",
        arg=[images, count],
    )


def test_an_upload_is_read_and_an_image_drawn(page, picture):
    attach(page, "#message", picture)
    say(page, "What is in the image?")
    loaded(page, "#conversation .user img")
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
    page.get_by_label("Guidance scale").fill("0.5")
    say(page, "a <b>bold</b> ring")
    error = page.locator("[data-testid=toast-body]", has_text="guidance_scale must be at least 1")
    error.wait_for()
    assert page.locator("#message textarea").input_value() == "a <b>bold</b> ring"  # the message is kept
    page.get_by_label("Guidance scale").fill("2")
    say(page, "<|image_pad|>")
    page.locator("[data-testid=toast-body]", has_text="the text holds <|image_pad|>").wait_for()
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
