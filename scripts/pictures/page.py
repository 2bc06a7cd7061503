"""Take the screenshots of the demo page with the included model, in Chromium without network access.

    python scripts/pictures/page.py

writes docs/demo_chat_*.png (a conversation with drawings and an example image) and docs/demo_levels_*.png (an image
level by level), at widths of 1280 and 390 pixels, in light mode and, as *_dark.png, in dark mode. It needs
`pip install 'evotok[demo,test]'` and `apt-get install chromium`.
"""

import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from evotok_plugin.common.command_parser import CommandParser
from evotok_plugin.common.pictures import save_picture
from evotok_plugin.data.images import open_picture
from evotok_plugin.errors import UserError
from llava_ext.model_folder import default_model_folder, open_model

if TYPE_CHECKING:  # an optional package
    from playwright.sync_api import Browser, Page

DOCS = Path(__file__).resolve().parents[2] / "docs"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
PROMPT = "a photo of a red circle above a blue square"
QUESTION = "Where is the circle relative to the square?"
SEVERAL = "a photo of a blue ring"
PICTURES = (  # tab, width, and whether in dark mode
    ("chat", 1280, False),
    ("levels", 1280, True),
    ("chat", 390, False),
    ("levels", 390, False),
    ("chat", 390, True),
)
_HEIGHTS = {1280: 900, 390: 844}  # by width
_TIMEOUT_MS = 120_000
_COLORS = 256  # of a PNG file


def find_browser() -> str | None:
    """The path of an installed Chromium, or None."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


@contextmanager
def served(model: str | Path) -> Iterator[str]:
    """Serve the page of a model on a free port; yields its address."""
    from llava_ext.serving.introduction import read_introduction
    from llava_ext.serving.page import build_demo, launch_demo

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    demo = build_demo(open_model(model, "cpu"), introduction=read_introduction(model))
    try:
        yield launch_demo(demo, port=port, wait=False)
    finally:
        demo.close(verbose=False)


def converse(page: "Page") -> None:
    """Have an image drawn by an example, ask about an image, and have four images drawn at the same time."""
    _answer(page, lambda: page.locator("#examples").get_by_text(PROMPT, exact=True).click())
    _answer(page, lambda: page.locator("#examples").get_by_text(QUESTION).click())
    page.get_by_label("an image", exact=True).check()
    page.get_by_label("number input for Drawings").fill("4")
    page.fill("#message textarea", SEVERAL)
    _answer(page, lambda: page.press("#message textarea", "Enter"))


def _answer(page: "Page", start: Callable[[], None]) -> None:
    """Start an answer and wait until it is complete."""
    answers = page.locator("#conversation .bot-row")
    before = answers.count()
    start()
    answers.nth(before).wait_for()
    page.wait_for_selector("#message textarea:enabled")
    _wait_for_images(page)


def rebuild(page: "Page", image: Path) -> None:
    """Have an image rebuilt level by level."""
    page.get_by_role("tab", name="Evolution").click()
    page.set_input_files("#evolving input[type=file]", image)
    page.wait_for_selector("#evolving img")
    page.click("#rebuild")
    page.wait_for_selector("#levels .thumbnail-item")
    _wait_for_images(page)


def _wait_for_images(page: "Page") -> None:
    visible = "[...document.images].filter(image => image.offsetParent)"  # the others may never be loaded
    page.wait_for_function(f"{visible}.every(image => image.complete)")


def screenshot(page: "Page") -> Image.Image:
    """The whole page, also below its visible part, with few colors."""
    page.evaluate("document.activeElement.blur()")
    page.mouse.move(0, 0)
    page.wait_for_timeout(500)  # animations
    picture = open_picture(page.screenshot(full_page=True, animations="disabled", caret="hide"), "the screenshot")
    return picture.quantize(_COLORS, dither=Image.Dither.NONE)


def take_pictures(browser: "Browser", address: str, image: Path, folder: Path) -> None:
    """Write the screenshots; `image` is rebuilt level by level."""
    for tab, width, dark in PICTURES:
        view = {"width": width, "height": _HEIGHTS[width]}
        page = browser.new_page(viewport=view, color_scheme="dark" if dark else "light")
        page.set_default_timeout(_TIMEOUT_MS)
        page.goto(address)
        page.wait_for_selector("#message textarea")
        if tab == "chat":
            converse(page)
        else:
            rebuild(page, image)
        path = folder / f"demo_{tab}_{width}{'_dark' if dark else ''}.png"
        save_picture(screenshot(page), path)
        print(path, flush=True)
        page.close()


def main() -> None:
    """Write the screenshots."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--model", help="model folder with these examples (default: the included model)")
    parser.add_argument("--browser", default=find_browser(), help="Chromium (default: the one in PATH)")
    parser.add_argument("-o", "--output", type=Path, default=DOCS, help="folder of the pictures")
    options = parser.parse_args()
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise UserError("the screenshots need playwright: pip install 'evotok[demo,test]'") from error
    if options.browser is None:
        raise UserError(f"found none of {', '.join(BROWSERS)}; apt-get install chromium, or pass --browser PATH")
    model = Path(options.model or default_model_folder())
    with served(model) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=options.browser, args=list(FLAGS))
        take_pictures(browser, address, model / "example.png", options.output)
        browser.close()


if __name__ == "__main__":
    main()
