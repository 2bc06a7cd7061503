"""Bundles of source files with relative imports."""

import ast
import sys

import pytest

from evotok_plugin.export.code_bundle import bundle


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package `bundled_example` whose modules import each other in every form that a bundle supports."""
    root = tmp_path / "bundled_example"
    (root / "parts").mkdir(parents=True)
    (root / "__init__.py").write_text("def __getattr__(name):\n    from bundled_example.parts import shapes\n")
    (root / "__init__.py").write_text("from bundled_example.parts.shapes import Shape\n")
    (root / "parts" / "__init__.py").write_text("")
    (root / "parts" / "shapes.py").write_text("class Shape:\n    sides = 3\n")
    (root / "parts" / "lazy.py").write_text("def area(shape):\n    return shape.sides\n")
    (root / "main.py").write_text(
        "import os\n"
        "from bundled_example import Shape as Form\n"
        "from bundled_example.parts import shapes\n"
        "from bundled_example.parts.shapes import (\n    Shape,\n)\n\n\n"
        "class Main:\n"
        "    def area(self):\n"
        "        from bundled_example.parts.lazy import area\n\n"
        "        return area(Form), shapes.Shape is Shape is Form, os.sep\n"
    )
    (root / "bad.py").write_text("import bundled_example.parts.shapes\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield root
    for name in [name for name in sys.modules if name.split(".")[0] in ("bundled_example", "flat_bundle")]:
        del sys.modules[name]


def test_a_flat_folder_works_alone(package, tmp_path, monkeypatch):
    files = bundle("entry", {"Main": "bundled_example.main"}, ["bundled_example"])
    assert set(files) == {
        "entry.py", "bundled_example_main.py", "bundled_example_parts_shapes.py", "bundled_example_parts_lazy.py",
    }  # fmt: skip
    (tmp_path / "flat_bundle").mkdir()
    for name, text in files.items():
        ast.parse(text)
        (tmp_path / "flat_bundle" / name).write_text(text)
    package.rename(tmp_path / "elsewhere")
    from flat_bundle.entry import Main  # type: ignore[import-not-found]

    assert Main().area()[:2] == (3, True) and Main.__module__ == "flat_bundle.entry"


def test_an_import_of_a_whole_module_is_rejected(package):
    with pytest.raises(ValueError, match="bad imports bundled_example.parts.shapes as a whole"):
        bundle("entry", {"Main": "bundled_example.bad"}, ["bundled_example"])
