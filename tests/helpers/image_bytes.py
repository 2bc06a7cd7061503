"""Small images and their encoded bytes, for tests of the image reader."""

import io
import struct
import zlib

import numpy as np

from evotok_plugin.data.images import as_picture

CORNERS = np.array(  # (2, 3, 3): a different color in each place
    [[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[255, 255, 0], [0, 255, 255], [255, 0, 255]]], np.uint8
)


def encoded(picture, kind, **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def pixels(image):
    """RGB values as nested lists (H, W, 3)."""
    picture = as_picture(image)
    assert picture.mode == "RGB" and not picture.info
    return np.asarray(picture).tolist()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(size, bits, color_type, rows, *chunks):
    """Encode a PNG file without Pillow, which does not write some depths and chunks."""
    header = struct.pack(">IIBBBBB", *size, bits, color_type, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunks) + data + chunk(b"IEND", b"")
