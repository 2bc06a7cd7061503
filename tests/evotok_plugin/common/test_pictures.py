"""Image files: written atomically, in the format of their suffix."""

import pytest
from PIL import Image

from evotok_plugin.common.pictures import save_picture
from evotok_plugin.errors import UserError


@pytest.mark.parametrize(("name", "kind"), [("a.png", "PNG"), ("a.JPG", "JPEG"), ("a.webp", "WEBP")])
def test_the_suffix_chooses_the_format(tmp_path, name, kind):
    save_picture(Image.new("RGB", (8, 8)), tmp_path / name)
    assert Image.open(tmp_path / name).format == kind and [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["a.webp", "a.jpg"])
def test_an_image_that_is_too_large_for_its_format_is_reported(tmp_path, name):
    with pytest.raises(UserError, match=f"{name}"):
        save_picture(Image.new("RGB", (70_000, 1)), tmp_path / name)
    assert not list(tmp_path.iterdir())
