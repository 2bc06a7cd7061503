"""Jinja templates of a package."""

import sys

import jinja2
import pytest

from evotok_plugin.common.templates import open_template


@pytest.fixture
def package(tmp_path, monkeypatch):
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "__init__.py").touch()
    for name in ("page.html.jinja", "card.md.jinja"):
        (tmp_path / "pages" / name).write_text("{% if true %}\n# {{ title }}\n{% endif %}\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "pages"
    sys.modules.pop("pages", None)


def test_only_html_is_escaped(package):
    assert open_template(package, "page.html.jinja").render(title="a < b") == "# a &lt; b\n"
    assert open_template(package, "card.md.jinja").render(title="a < b") == "# a < b\n"


def test_a_value_that_is_not_given_is_an_error(package):
    with pytest.raises(jinja2.UndefinedError, match="title"):
        open_template(package, "card.md.jinja").render()
