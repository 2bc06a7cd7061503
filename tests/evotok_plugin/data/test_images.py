"""The image reader: formats, strings that contain or name an image, limits and errors."""

import base64
import io
import os
import struct
import threading
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from image_bytes import CORNERS, encoded, pixels, png
from PIL import Image, ImageFile

from evotok_plugin.data import images
from evotok_plugin.data.images import (
    FORMATS,
    IMAGE_SUFFIXES,
    as_picture,
    embedded_content,
    is_embedded,
    local_file,
    open_picture,
)
from evotok_plugin.errors import UserError


def test_every_suffix_can_be_read(tmp_path):
    for suffix in IMAGE_SUFFIXES:
        path = tmp_path / f"a{suffix}"
        options = {"format": "JPEG"} if suffix == ".mpo" else {}
        Image.new("1" if suffix == ".pbm" else "L" if suffix == ".pgm" else "RGB", (16, 16), 0).save(path, **options)
        assert np.asarray(open_picture(path)).max() <= 3, suffix


def test_strings_contain_or_name_an_image(tmp_path):
    content = encoded(Image.fromarray(CORNERS), "PNG")
    path = tmp_path / "a picture.png"
    path.write_bytes(content)
    text = base64.b64encode(content).decode()
    for image in (path, str(path), path.as_uri(), content, bytearray(content), f"data:image/png;base64,{text}", text):
        assert pixels(image) == CORNERS.tolist()
    for image, message in (
        ("https://example.com/a.png", "'https://example.com/a.png' cannot be read: URLs are not fetched"),
        ("data:image/png;base64,!!!", "base64"),
        ("data:image/png", "no comma"),
        ("gs://bucket/a.png", "'gs://bucket/a.png' cannot be read: URLs are not fetched"),
        ("s3://bucket/a.png", "URLs are not fetched"),
        ("file://a.png", "it is on host 'a.png'.* begin with file:///"),
        ("file://", "the file URL has no path"),
        ("data:image/png;base64,", "the embedded image is empty"),
        (f"file://server{path}", "it is on host 'server' and only local files are read"),
        (str(tmp_path / "gone.png"), "gone.png' does not exist"),
        ("/data/" + "a" * 80, "does not exist"),
        ("a" * 5_000, "cannot be read: File name too long"),
        ("data:image/png;base64," + "A" * 100_000, r"\(100022 characters\)' cannot be read"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            open_picture(image)
        assert len(str(caught.value)) < 400


def encodings(content):
    """All supported encodings of an image in a string."""
    text = base64.b64encode(content).decode()
    lines = base64.encodebytes(content).decode()
    yield from (text, lines, f"\n{text}\n")
    for head in ("data:image/png", "DATA:image/png", "data:application/octet-stream", "data:", "data:;charset=utf-8"):
        yield from (f"{head};base64,{text}", f"{head};BASE64,{lines}", f"{head};base64,{quote(text, safe='')}")
        yield f"{head},{quote(content)}"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM"])
def test_every_encoding_of_an_embedded_image_is_decoded(kind):
    content = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)), kind)
    for text in encodings(content):
        assert is_embedded(text) and embedded_content(text) == content, text[:60]
        assert embedded_content(text, is_base64=True) == content
    assert pixels(text) == pixels(content)


def test_paths_are_not_embedded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named = "AAAA" + "a" * 60
    assert is_embedded(named)
    (tmp_path / named).touch()
    for text in (named, "/9j/" + "a" * 60 + ".jpg", "a.png", "database:a.png", "https://example.org/a.png", ""):
        assert not is_embedded(text) and embedded_content(text) is None
    with pytest.raises(UserError, match="base64"):
        embedded_content("é" * 80, is_base64=True)


@pytest.mark.parametrize("name", ["a#1.png", "a?b=1.png", "a b.png", "100%.png", "é.png", "a+b.png", "a;b.png"])
def test_a_file_url_names_the_whole_path(tmp_path, name):
    (tmp_path / name).write_bytes(encoded(Image.fromarray(CORNERS), "PNG"))
    path = str(tmp_path / name)
    bare = path.replace("%", "%25")
    for url in (Path(path).as_uri(), f"file://{bare}", f"FILE://{bare}", f"file://localhost{bare}", f"file:{bare}"):
        assert local_file(url) == path and pixels(url) == CORNERS.tolist()
    assert local_file(path) == path


@pytest.mark.parametrize(
    "head", [b"%!PS-Adobe-3.0 EPSF-3.0\n", b"8BPS\0\1", b"SIMPLE  =", b"%PDF-1.4", b"\xd7\xcd\xc6\x9a"]
)
def test_other_formats_do_not_reach_a_parser(tmp_path, monkeypatch, head):
    Image.init()
    for kind in set(Image.OPEN) - set(FORMATS):
        monkeypatch.setitem(Image.OPEN, kind, (lambda *_: pytest.fail("a parser was started"), None))
    path = tmp_path / "x.png"
    path.write_bytes(head + bytes(100))
    with pytest.raises(UserError, match="x.png' cannot be read: it is broken, or none of PNG, JPEG"):
        open_picture(path)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("no frame"), SyntaxError("x"), struct.error("x"), OverflowError(), MemoryError(), KeyError(3)],
)
def test_every_error_of_a_decoder_names_the_file(tmp_path, monkeypatch, error):
    def fail(self):
        raise error

    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(UserError, match=f"a.png' cannot be read: {type(error).__name__}") as caught:
        open_picture(tmp_path / "a.png")
    assert caught.value.__cause__ is error


def test_a_damaged_avif_file_is_a_broken_image(rng):
    content = bytearray(encoded(Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)), "AVIF"))
    start = content.index(b"mdat") + 4
    content[start : start + 200] = bytes(200)
    with pytest.raises(UserError, match="image 'a.jpg' cannot be read"):
        open_picture(bytes(content), "a.jpg")


def test_formats_unknown_to_pillow_are_skipped(monkeypatch):
    Image.init()
    monkeypatch.delitem(Image.OPEN, "AVIF")
    monkeypatch.setattr(images, "_supported", images._supported.__wrapped__)
    content = encoded(Image.fromarray(CORNERS), "JPEG2000", irreversible=False)
    assert pixels(content) == CORNERS.tolist()
    with pytest.raises(UserError, match="it is broken, or none of"):
        open_picture(b"not an image")


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    for path in (tmp_path / "a.png", tmp_path, Path("/dev/zero")):
        with pytest.raises(UserError, match="it is a (folder|pipe or a device), expected a file"):
            open_picture(path)


def test_the_pixel_limit_is_checked_before_decoding(monkeypatch):
    bomb = png((13_000, 13_000), 1, 0, b"")  # without any pixel data
    with pytest.raises(UserError, match="'image of .*' has 13000 x 13000 pixels, more than the 89,478,485 allowed"):
        open_picture(bomb)
    with pytest.raises(UserError, match="far more than the 89,478,485 pixels allowed"):
        open_picture(png((60_000, 60_000), 1, 0, b""))
    whole = encoded(Image.new("RGB", (30, 20)), "PNG")
    monkeypatch.setattr(images, "MAX_PIXELS", 599)
    with pytest.raises(UserError, match="30 x 20 pixels.*raise evotok_plugin.data.images.MAX_PIXELS"):
        open_picture(whole)
    monkeypatch.setattr(images, "MAX_PIXELS", 600)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # another library's limit
    assert open_picture(whole).size == (30, 20) and Image.MAX_IMAGE_PIXELS == 100


def test_truncated_files_are_rejected_in_every_thread(monkeypatch, rng):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    whole = encoded(Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)), "PNG")
    half, read = whole[: len(whole) // 2], []

    def look():
        for _ in range(50):
            try:
                read.append(open_picture(half))
            except UserError:
                open_picture(whole)

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not read and ImageFile.LOAD_TRUNCATED_IMAGES is True
    with pytest.raises(UserError, match="cannot be read"):
        as_picture(Image.open(io.BytesIO(half)))


def test_truncated_images_are_rejected_even_if_pillow_is_set_to_accept_them(tmp_path, monkeypatch, rng):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    half = tmp_path / "half.png"
    Image.fromarray(rng.integers(0, 256, (50, 60, 3), dtype=np.uint8)).save(half)
    half.write_bytes(half.read_bytes()[: half.stat().st_size // 2])
    with pytest.raises(ValueError, match="half.png' cannot be read"):
        open_picture(half)
    with pytest.raises(ValueError, match="a name' cannot be read"):
        open_picture(half.read_bytes(), "a name")
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True
