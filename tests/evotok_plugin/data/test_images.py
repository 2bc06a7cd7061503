"""The reader of images: colors, orientation, ranges, formats and limits."""

import base64
import io
import os
import struct
import threading
import zlib
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
import torch
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

CORNERS = np.array(  # (2, 3, 3): a different color in each place
    [[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[255, 255, 0], [0, 255, 255], [255, 0, 255]]], np.uint8
)


def encoded(picture, kind, **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def pixels(image):
    """RGB values, row by row, as lists."""
    picture = as_picture(image)
    assert picture.mode == "RGB" and not picture.info
    return np.asarray(picture).tolist()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(size, bits, color_type, rows, *chunks):
    """A PNG file by hand, for depths and chunks that Pillow does not write."""
    header = struct.pack(">IIBBBBB", *size, bits, color_type, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunks) + data + chunk(b"IEND", b"")


# Orientation ----------------------------------------------------------------------------------------------------

UPRIGHT = {  # how the stored pixels of each EXIF orientation are to be shown
    1: CORNERS,
    2: CORNERS[:, ::-1],
    3: CORNERS[::-1, ::-1],
    4: CORNERS[::-1],
    5: CORNERS.transpose(1, 0, 2),
    6: CORNERS.transpose(1, 0, 2)[:, ::-1],
    7: CORNERS.transpose(1, 0, 2)[::-1, ::-1],
    8: CORNERS.transpose(1, 0, 2)[::-1],
}


def exif(orientation):
    made = Image.Exif()
    made[0x0112] = orientation
    return made


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_orientation_is_applied(kind, orientation):
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    content = encoded(Image.fromarray(CORNERS), kind, exif=exif(orientation), **options)
    expected = UPRIGHT[orientation].tolist()
    assert pixels(content) == expected
    lazy = Image.open(io.BytesIO(content))
    assert pixels(lazy) == expected
    if kind != "TIFF":  # Pillow turns TIFF images on its own while it decodes
        assert pixels(Image.open(io.BytesIO(content)).convert("RGB")) == expected
    assert pixels(as_picture(lazy)) == expected  # and only once


def test_orientation_of_jpeg_files_and_of_nonsense():
    picture = Image.new("RGB", (96, 48), "red")
    assert open_picture(encoded(picture, "JPEG", exif=exif(6))).size == (48, 96)
    for orientation in (0, 9):
        assert open_picture(encoded(picture, "JPEG", exif=exif(orientation))).size == (96, 48)
    assert open_picture(encoded(picture, "JPEG", exif=b"Exif\0\0no TIFF header")).size == (96, 48)


# Transparency ---------------------------------------------------------------------------------------------------


def palette_image(**info):
    picture = Image.new("P", (3, 1))
    picture.putpalette([0, 0, 0, 200, 0, 0, 0, 0, 100])
    picture.putdata([0, 1, 2])
    picture.info.update(info)
    return picture


HALF = [127, 127, 127]  # black at alpha 128 on white
TRANSPARENT = {
    "RGBA": (Image.fromarray(np.array([[[0, 0, 0, 0], [0, 0, 0, 128], [9, 8, 7, 255]]], np.uint8)), [9, 8, 7]),
    "LA": (Image.fromarray(np.array([[[0, 0], [0, 128], [9, 255]]], np.uint8), "LA"), [9, 9, 9]),
    "RGBa": (
        Image.fromarray(np.array([[[0, 0, 0, 0], [0, 0, 0, 128], [9, 8, 7, 255]]], np.uint8)).convert("RGBa"),
        [9, 8, 7],
    ),
    "La": (Image.fromarray(np.array([[[0, 0], [0, 128], [9, 255]]], np.uint8), "LA").convert("La"), [9, 9, 9]),
}


@pytest.mark.parametrize("mode", TRANSPARENT)
def test_alpha_is_composited_on_white(mode):
    picture, opaque = TRANSPARENT[mode]
    assert pixels(picture) == [[[255, 255, 255], HALF, opaque]]
    if mode in ("RGBA", "LA"):
        assert pixels(encoded(picture, "PNG")) == [[[255, 255, 255], HALF, opaque]]


def test_transparent_palettes_are_composited_on_white():
    assert pixels(palette_image()) == [[[0, 0, 0], [200, 0, 0], [0, 0, 100]]]
    one = palette_image(transparency=1)
    assert pixels(one) == [[[0, 0, 0], [255, 255, 255], [0, 0, 100]]]
    several = palette_image(transparency=bytes([128, 255, 0]))
    assert pixels(several) == [[HALF, [200, 0, 0], [255, 255, 255]]]
    assert several.palette.mode == "RGB" and several.info["transparency"]  # the caller's image is as before
    for kind in ("PNG", "GIF"):
        assert pixels(encoded(palette_image(), kind, transparency=1)) == pixels(one)
    with_alpha = palette_image(transparency=1).convert("PA")
    assert with_alpha.mode == "PA" and pixels(with_alpha) == pixels(one)


@pytest.mark.parametrize(
    ("bits", "row", "color", "levels"),
    [
        (1, b"\x40", 1, [0, None]),
        (2, b"\x60", 2, [85, None]),
        (4, b"\x5a", 10, [85, None]),
        (8, b"\x05\x0a", 5, [None, 10]),
        (16, b"\x80\x80\x80\x81", 0x8081, [128, None]),
    ],
)
def test_transparent_grey_at_every_depth(bits, row, color, levels):
    content = png((2, 1), bits, 0, b"\0" + row, chunk(b"tRNS", struct.pack(">H", color)))
    assert pixels(content) == [[[255 if level is None else level] * 3 for level in levels]]


def test_transparent_rgb_colors():
    row = struct.pack(">6B", 1, 2, 3, 1, 2, 4)
    content = png((2, 1), 8, 2, b"\0" + row, chunk(b"tRNS", struct.pack(">3H", 1, 2, 3)))
    assert pixels(content) == [[[255, 255, 255], [1, 2, 4]]]
    row = struct.pack(">6H", 0x1200, 0x3400, 0x5600, 0x1200, 0x3400, 0x7800)
    content = png((2, 1), 16, 2, b"\0" + row, chunk(b"tRNS", struct.pack(">3H", 0x1200, 0x3400, 0x5600)))
    assert pixels(content) == [[[255, 255, 255], [0x12, 0x34, 0x78]]]


# Depths and color spaces ----------------------------------------------------------------------------------------

RAMP = np.array([[0, 257, 32896, 65535]], np.uint16)
RAMP_SEEN = [[[level] * 3 for level in (0, 1, 128, 255)]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_16_bit_grey_files(kind):
    options = {"irreversible": False} if kind == "JPEG2000" else {}
    assert pixels(encoded(Image.fromarray(RAMP), kind, **options)) == RAMP_SEEN


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I;16N", "I"])
def test_16_bit_grey_modes(mode):
    picture = Image.fromarray(RAMP.astype(np.int32)) if mode == "I" else Image.new(mode, (4, 1))
    for x, value in enumerate(RAMP[0].tolist()):
        picture.putpixel((x, 0), value)
    assert picture.mode == mode and pixels(picture) == RAMP_SEEN


def test_16_bit_color_and_alpha():
    color = png((1, 1), 16, 2, b"\0" + struct.pack(">3H", 0xFFFF, 0x8000, 0))
    assert pixels(color) == [[[255, 128, 0]]]
    alpha = png((2, 1), 16, 4, b"\0" + struct.pack(">4H", 0, 0, 0x1234, 0xFFFF))
    assert pixels(alpha) == [[[255, 255, 255], [0x12] * 3]]


def test_white_is_zero_and_12_bits_in_tiff():
    inverted = encoded(Image.fromarray(RAMP), "TIFF", tiffinfo={262: 0})
    assert pixels(inverted) == [[[level] * 3 for level in (255, 254, 127, 0)]]
    whole = bytearray(encoded(Image.fromarray(np.zeros((1, 3), np.uint16)), "TIFF"))
    tags, directory = struct.unpack_from("<H", whole, struct.unpack_from("<I", whole, 4)[0])[0], 0
    directory = struct.unpack_from("<I", whole, 4)[0] + 2
    for start in range(directory, directory + 12 * tags, 12):
        tag = struct.unpack_from("<H", whole, start)[0]
        if tag == 258:  # 12 bits a sample
            struct.pack_into("<H", whole, start + 8, 12)
        if tag == 273:  # where the three samples are: 0x000, 0x800, 0xfff
            offset = struct.unpack_from("<I", whole, start + 8)[0]
    whole[offset : offset + 5] = bytes([0x00, 0x08, 0x00, 0xFF, 0xF0])
    assert pixels(bytes(whole)) == [[[level] * 3 for level in (0, 128, 255)]]


def test_floats_of_0_to_1_are_rescaled():
    picture = Image.fromarray(np.array([[0, 0.5, 1]], np.float32))
    assert picture.mode == "F"
    for image in (picture, encoded(picture, "TIFF")):
        assert pixels(image) == [[[level] * 3 for level in (0, 128, 255)]]


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (Image.fromarray(np.array([[0, 200]], np.float32)), r"values of 0\.\.1 in a float image.*got 0\.\.200"),
        (Image.fromarray(np.array([[-1, 1]], np.float32)), r"got -1\.\.1"),
        (Image.fromarray(np.array([[np.nan, 1]], np.float32)), "nan"),
        (Image.fromarray(np.array([[0, 70_000]], np.int32)), r"0\.\.65535 in an image of mode I, got 0\.\.70000"),
        (Image.fromarray(np.array([[-5, 300]], np.int32)), r"got -5\.\.300"),
        (Image.new("L", (2, 2), 90).convert("I"), "would be read as black"),
        (Image.fromarray(np.array([[0, 255]], np.uint16)), "would be read as black"),
        (Image.new("RGB", (0, 3)), "no pixels"),
    ],
)
def test_values_of_an_unknown_range_are_rejected(picture, message):
    with pytest.raises(ValueError, match=message):
        as_picture(picture)


def test_color_spaces():
    orange = Image.new("RGB", (8, 8), (255, 128, 0))
    for mode in ("CMYK", "YCbCr", "HSV", "RGBX"):
        assert np.abs(np.array(pixels(orange.convert(mode))) - [255, 128, 0]).max() <= 2, mode
    for kind, mode in (("JPEG", "CMYK"), ("TIFF", "CMYK"), ("TIFF", "LAB")):  # JPEG stores CMYK inverted, as Adobe does
        assert np.abs(np.array(pixels(encoded(orange.convert(mode), kind))) - [255, 128, 0]).max() <= 10, (kind, mode)
    assert pixels(Image.frombytes("1", (2, 1), b"\x40")) == [[[0] * 3, [255] * 3]]


def test_the_first_image_of_an_animation():
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    for kind in ("GIF", "PNG", "WEBP", "TIFF", "AVIF"):
        options = {"lossless": True} if kind == "WEBP" else {}
        content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert Image.open(io.BytesIO(content)).n_frames == 2
        assert np.abs(np.array(pixels(content)) - [255, 0, 0]).max() <= 3, kind


# Arrays and tensors ---------------------------------------------------------------------------------------------

BAND = np.concatenate([CORNERS, CORNERS[:, :2]], axis=1)  # (2, 5, 3): its shape tells where the channels are
COLORS = BAND.astype(np.int64)


@pytest.mark.parametrize(
    "image",
    [
        BAND,
        BAND.transpose(2, 0, 1),
        BAND[:, ::-1][:, ::-1],
        COLORS,
        (COLORS * 257).astype(np.uint16),
        (COLORS * 257).astype(">u2"),
        COLORS > 0,
        COLORS / 255,
        (COLORS / 255).astype(np.float16),
        np.concatenate([BAND, np.full((2, 5, 1), 255, np.uint8)], axis=2),
        torch.from_numpy(BAND),
        torch.from_numpy(BAND).permute(2, 0, 1),
        torch.from_numpy(COLORS).permute(2, 0, 1).to(torch.int32),
        torch.from_numpy(COLORS * 257).permute(2, 0, 1).to(torch.uint16),
        torch.from_numpy(COLORS > 0).permute(2, 0, 1),
        torch.from_numpy(COLORS / 255).permute(2, 0, 1).bfloat16().requires_grad_(),
    ],
)
def test_arrays_are_scaled_by_their_type(image):
    assert pixels(image) == BAND.tolist()


def test_tensors_have_their_channels_first_and_arrays_last_where_both_could_be():
    for image in (CORNERS, torch.from_numpy(CORNERS).permute(2, 0, 1)):
        assert pixels(image) == CORNERS.tolist()
    swapped = as_picture(CORNERS.transpose(2, 0, 1), channels_first=True)
    assert np.array_equal(np.asarray(swapped), CORNERS)


def test_grey_and_transparent_arrays():
    grey = np.array([[0, 100, 200, 250, 255]], np.uint8)
    for image in (grey, grey[..., None], grey[None], torch.from_numpy(grey), torch.from_numpy(grey)[None]):
        assert pixels(image) == [[[level] * 3 for level in (0, 100, 200, 250, 255)]]
    rgba = np.zeros((2, 5, 4), np.uint8)
    rgba[0, :, 3] = 128
    for image in (rgba, torch.from_numpy(rgba).permute(2, 0, 1), rgba / 255):
        assert pixels(image) == [[HALF] * 5, [[255] * 3] * 5]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.rand(3, 8, 8) * 255, r"expected values of 0\.\.1 in a tensor of shape \(3, 8, 8\).*float32"),
        (torch.rand(3, 8, 8) * 2 - 1, r"expected values of 0\.\.1"),
        (np.full((8, 8, 3), np.nan), "nan"),
        (np.full((8, 8, 3), 256), r"expected values of 0\.\.255 in an array .*int64, got 256\.\.256"),
        (np.full((8, 8, 3), -1, np.int8), r"got -1\.\.-1"),
        (np.full((8, 8, 3), 200, np.uint16), "would be read as black"),
        (np.zeros((8, 8, 2), np.uint8), r"1, 3 or 4 channels, got an array of shape \(8, 8, 2\)"),
        (np.zeros((5, 8, 8, 3), np.uint8), r"shape \(5, 8, 8, 3\)"),
        (np.zeros((0, 8, 3), np.uint8), "no pixels"),
        (np.zeros((8, 8, 3), complex), "boolean, integer or float"),
        (np.full((8, 8), "a"), "boolean, integer or float"),
        (torch.zeros(3, 8, 8).to_sparse(), "dense tensor"),
        (torch.zeros(3, 8, 8, device="meta"), "dense tensor"),
        (None, "got NoneType"),
        (7, "got int"),
        ({"path": "a.png"}, "got dict"),
    ],
)
def test_other_things_are_rejected_by_name(image, message):
    with pytest.raises(ValueError, match=message):
        as_picture(image)


# Files ----------------------------------------------------------------------------------------------------------


def test_every_suffix_can_be_read(tmp_path):
    for suffix in IMAGE_SUFFIXES:
        path = tmp_path / f"a{suffix}"
        options = {"format": "JPEG"} if suffix == ".mpo" else {}
        Image.new("1" if suffix == ".pbm" else "L" if suffix == ".pgm" else "RGB", (16, 16), 0).save(path, **options)
        assert np.asarray(open_picture(path)).max() <= 3, suffix


def test_strings_that_hold_or_name_an_image(tmp_path):
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
        ("file://a.png", "a file of host 'a.png'.* the URL of a local one is file:///PATH"),
        ("file://", "the file URL has no path"),
        ("data:image/png;base64,", "the embedded image is empty"),
        (f"file://server{path}", "a file of host 'server', and only local files are read"),
        (str(tmp_path / "gone.png"), "gone.png' does not exist"),
        ("/data/" + "a" * 80, "does not exist"),
        ("a" * 5_000, "cannot be read: File name too long"),
        ("data:image/png;base64," + "A" * 100_000, r"\(100022 characters\)' cannot be read"),
    ):
        with pytest.raises(ValueError, match=message) as refused:
            open_picture(image)
        assert len(str(refused.value)) < 400


def spellings(content):
    """Every way to write an image into a string."""
    text = base64.b64encode(content).decode()
    lines = base64.encodebytes(content).decode()
    yield from (text, lines, f"\n{text}\n")
    for head in ("data:image/png", "DATA:image/png", "data:application/octet-stream", "data:", "data:;charset=utf-8"):
        yield from (f"{head};base64,{text}", f"{head};BASE64,{lines}", f"{head};base64,{quote(text, safe='')}")
        yield f"{head},{quote(content)}"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM"])
def test_every_spelling_of_an_embedded_image_gives_its_content(kind):
    content = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)), kind)
    for text in spellings(content):
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
    with pytest.raises(ValueError, match="base64"):
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
def test_formats_outside_the_list_reach_no_parser(tmp_path, monkeypatch, head):
    Image.init()
    for kind in set(Image.OPEN) - set(FORMATS):
        monkeypatch.setitem(Image.OPEN, kind, (lambda *_: pytest.fail("a parser was started"), None))
    path = tmp_path / "x.png"
    path.write_bytes(head + bytes(100))
    with pytest.raises(ValueError, match="x.png' cannot be read: it is broken, or none of PNG, JPEG"):
        open_picture(path)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("no frame"), SyntaxError("x"), struct.error("x"), OverflowError(), MemoryError(), KeyError(3)],
)
def test_whatever_a_decoder_raises_names_the_file(tmp_path, monkeypatch, error):
    def fail(self):
        raise error

    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(ValueError, match=f"a.png' cannot be read: {type(error).__name__}") as refused:
        open_picture(tmp_path / "a.png")
    assert refused.value.__cause__ is error


def test_a_damaged_avif_file_is_a_broken_image(rng):
    content = bytearray(encoded(Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)), "AVIF"))
    start = content.index(b"mdat") + 4
    content[start : start + 200] = bytes(200)
    with pytest.raises(ValueError, match="image 'a.jpg' cannot be read"):
        open_picture(bytes(content), "a.jpg")


def test_formats_that_pillow_lacks_are_left_out(monkeypatch):
    Image.init()
    monkeypatch.delitem(Image.OPEN, "AVIF")
    monkeypatch.setattr(images, "_supported", images._supported.__wrapped__)
    content = encoded(Image.fromarray(CORNERS), "JPEG2000", irreversible=False)
    assert pixels(content) == CORNERS.tolist()
    with pytest.raises(ValueError, match="it is broken, or none of"):
        open_picture(b"no image")


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    for path in (tmp_path / "a.png", tmp_path, Path("/dev/zero")):
        with pytest.raises(ValueError, match="not a regular file"):
            open_picture(path)


def test_the_pixel_limit_is_checked_before_decoding(monkeypatch):
    bomb = png((13_000, 13_000), 1, 0, b"")  # its pixels are not even there
    with pytest.raises(ValueError, match="'image of .*' has 13000 x 13000 pixels, more than the 89,478,485 allowed"):
        open_picture(bomb)
    with pytest.raises(ValueError, match="far more than the 89,478,485 pixels allowed"):
        open_picture(png((60_000, 60_000), 1, 0, b""))
    whole = encoded(Image.new("RGB", (30, 20)), "PNG")
    monkeypatch.setattr(images, "MAX_PIXELS", 599)
    with pytest.raises(ValueError, match="30 x 20 pixels.*raise evotok_plugin.data.images.MAX_PIXELS"):
        open_picture(whole)
    monkeypatch.setattr(images, "MAX_PIXELS", 600)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # another library's limit
    assert open_picture(whole).size == (30, 20) and Image.MAX_IMAGE_PIXELS == 100


def test_truncated_files_are_refused_by_every_thread(monkeypatch, rng):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    whole = encoded(Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)), "PNG")
    half, read = whole[: len(whole) // 2], []

    def look():
        for _ in range(50):
            try:
                read.append(open_picture(half))
            except ValueError:
                open_picture(whole)

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not read and ImageFile.LOAD_TRUNCATED_IMAGES is True
    with pytest.raises(ValueError, match="cannot be read"):
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
