"""The script that takes the screenshots of the page, in a real browser where there is one."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the page needs gradio: pip install 'evotok[demo]'")
pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")

from evotok_plugin.errors import UserError  # noqa: E402

ROOT = Path(__file__).resolve().parents[3]
NAMES = ["chat_1280", "chat_390", "chat_390_dark", "levels_1280_dark", "levels_390"]
NAMES = [f"demo_{name}.png" for name in NAMES]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts/pictures"))
    return importlib.import_module("page")


def test_screenshots_have_both_widths_and_both_modes(script, tmp_path, monkeypatch):
    if script.find_browser() is None:
        pytest.skip("no Chromium found: apt-get install chromium")
    monkeypatch.setattr(sys, "argv", ["page.py", "-o", str(tmp_path)])
    script.main()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(NAMES)
    for name in NAMES:
        picture = Image.open(tmp_path / name).convert("RGB")
        assert picture.width == (1280 if "1280" in name else 390) and picture.height >= 800
        assert (np.median(np.asarray(picture)) < 64) == ("dark" in name)


def test_without_a_browser_the_script_says_what_to_install(script, monkeypatch):
    monkeypatch.setattr(script, "find_browser", lambda: None)
    monkeypatch.setattr(sys, "argv", ["page.py"])
    with pytest.raises(UserError, match="apt-get install chromium, or pass --browser PATH"):
        script.main()


def test_the_screenshots_of_the_documentation_have_the_widths_of_their_names():
    page = (ROOT / "docs" / "play.md").read_text()
    for name in NAMES:
        assert f"({name})" in page
        assert Image.open(ROOT / "docs" / name).width == (1280 if "1280" in name else 390)
