"""Libraries that only one part may use: lmms-eval, DeepSpeed, unpickling, and decoding of images."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("evotok_plugin", "llava_ext", "eval_tasks")
FORBIDDEN = {"evotok_plugin": {"lmms_eval", "deepspeed"}, "llava_ext": {"lmms_eval"}}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", FORBIDDEN)
def test_libraries_of_later_packages_are_not_imported(package):
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        assert not imported(path) & FORBIDDEN[package], path


def test_only_the_converter_unpickles_and_runs_no_code():
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            calls = [
                node
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
            ]
            if path == ROOT / "evotok_plugin" / "conversion" / "research_file.py":
                (call,) = calls
                assert "weights_only=True" in [ast.unparse(keyword) for keyword in call.keywords]
                assert "from pickle import UnpicklingError\n" in path.read_text()  # the error, not a reader
            elif path == ROOT / "llava_ext" / "training" / "unpickling.py":  # restricts the readers of other packages
                assert not calls and "from pickle import UnpicklingError\n" in path.read_text()
            else:
                assert not calls and "pickle" not in imported(path), path


IMAGE_READER = {"evotok_plugin/data/images.py", "evotok_plugin/data/pixel_modes.py"}
TEXT_CHUNKS = "llava_ext/serving/image_files.py"  # reads the text chunks of own PNG files, and no pixels


def reads_images(call: ast.Call) -> bool:
    """Whether this call decodes an image, or converts it to RGB, without `evotok_plugin.data.images`."""
    name = ast.unparse(call.func)
    wants_rgb = name.endswith(".convert") and "'RGB'" in map(ast.unparse, call.args)
    return (
        wants_rgb or name.split(".")[-1] in ("exif_transpose", "load_image") or name in ("Image.open", "PIL.Image.open")
    )


def test_images_are_opened_in_one_place():
    found = {}
    for path in [path for folder in (*PACKAGES, "scripts") for path in (ROOT / folder).rglob("*.py")]:
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        if calls := [ast.unparse(call) for call in calls if reads_images(call)]:
            found[path.relative_to(ROOT).as_posix()] = calls
    assert found.pop(TEXT_CHUNKS) == ["Image.open(path, formats=('PNG',))"]
    assert set(found) == IMAGE_READER, f"use evotok_plugin.data.images: {found}"
