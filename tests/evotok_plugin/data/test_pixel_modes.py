"""Conversion to RGB: orientation, transparency, depths, color spaces, arrays and tensors."""

import io
import struct

import numpy as np
import pytest
import torch
from image_bytes import CORNERS, chunk, encoded, pixels, png
from PIL import Image

from evotok_plugin.data.images import as_picture, open_picture
from evotok_plugin.errors import UserError

# Orientation ----------------------------------------------------------------------------------------------------

UPRIGHT = {  # the image to show for stored pixels with each EXIF orientation
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
    if kind != "TIFF":  # Pillow rotates TIFF images itself when decoding
        assert pixels(Image.open(io.BytesIO(content)).convert("RGB")) == expected
    assert pixels(as_picture(lazy)) == expected  # only once


def test_orientation_of_jpeg_files_and_invalid_orientations():
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
    assert several.palette.mode == "RGB" and several.info["transparency"]  # the caller's image is unchanged
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
def test_transparent_gray_at_every_depth(bits, row, color, levels):
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
def test_16_bit_gray_files(kind):
    options = {"irreversible": False} if kind == "JPEG2000" else {}
    assert pixels(encoded(Image.fromarray(RAMP), kind, **options)) == RAMP_SEEN


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I;16N", "I"])
def test_16_bit_gray_modes(mode):
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
        if tag == 258:  # 12 bits per sample
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
    with pytest.raises(UserError, match=message):
        as_picture(picture)


def test_color_spaces():
    orange = Image.new("RGB", (8, 8), (255, 128, 0))
    for mode in ("CMYK", "YCbCr", "HSV", "RGBX"):
        assert np.abs(np.array(pixels(orange.convert(mode))) - [255, 128, 0]).max() <= 2, mode
    for kind, mode in (("JPEG", "CMYK"), ("TIFF", "CMYK"), ("TIFF", "LAB")):  # JPEG stores CMYK inverted, like Adobe
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

BAND = np.concatenate([CORNERS, CORNERS[:, :2]], axis=1)  # (2, 5, 3): its shape determines the position of the channels
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
def test_arrays_are_scaled_according_to_their_type(image):
    assert pixels(image) == BAND.tolist()


def test_ambiguous_channels_are_first_in_tensors_and_last_in_arrays():
    for image in (CORNERS, torch.from_numpy(CORNERS).permute(2, 0, 1)):
        assert pixels(image) == CORNERS.tolist()
    swapped = as_picture(CORNERS.transpose(2, 0, 1), channels_first=True)
    assert np.array_equal(np.asarray(swapped), CORNERS)


def test_gray_and_transparent_arrays():
    gray = np.array([[0, 100, 200, 250, 255]], np.uint8)
    for image in (gray, gray[..., None], gray[None], torch.from_numpy(gray), torch.from_numpy(gray)[None]):
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
def test_other_objects_are_rejected(image, message):
    with pytest.raises(UserError, match=message):
        as_picture(image)
