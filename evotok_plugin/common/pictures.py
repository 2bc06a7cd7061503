"""Image files, and images composed of others: grids and labeled rows."""

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from evotok_plugin.common.files import write_whole
from evotok_plugin.errors import UserError

_TEXT_HEIGHT = 16
_TEXT, _MARK = "#222222", "#0072B2"


def enlarged(image: Image.Image, scale: int) -> Image.Image:
    """Enlarge an image by a whole factor without smoothing."""
    if scale == 1:
        return image
    return image.resize((scale * image.width, scale * image.height), Image.Resampling.NEAREST)


def image_grid(images: Sequence[Image.Image], columns: int, scale: int = 1, gap: int = 4) -> Image.Image:
    """Images of one size, arranged row by row on white; `scale` enlarges small ones without smoothing."""
    width, height = images[0].width * scale, images[0].height * scale
    rows = -(-len(images) // columns)
    canvas = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for index, image in enumerate(images):
        place = ((index % columns) * (width + gap), (index // columns) * (height + gap))
        canvas.paste(enlarged(image, scale), place)
    return canvas


def save_picture(picture: Image.Image, path: str | Path) -> None:
    """Write an image file atomically, in the format of its suffix.

    Raises:
        UserError: the file system refuses, or the format does not support images of this size.
    """
    path = Path(path)
    image_format = Image.registered_extensions()[path.suffix.lower()]
    try:
        write_whole(path, lambda part: picture.save(part, format=image_format), shared=True)
    except (ValueError, RuntimeError, struct.error) as error:  # raised by Pillow's encoders
        if isinstance(error, UserError):
            raise
        size = f"{picture.width} x {picture.height} pixels"
        raise UserError(f"{path}: {image_format} does not support this image of {size} ({error}); use .png") from error


def picture_suffixes() -> list[str]:
    """The suffixes of image files that can be written."""
    Image.init()
    return [suffix for suffix, name in Image.registered_extensions().items() if name in Image.SAVE]


def labeled_rows(rows: dict[str, Sequence[Image.Image]], scale: int = 1, gap: int = 4) -> Image.Image:
    """One row of images per label, each below its label."""
    strips = {label: image_grid(images, len(images), scale, gap) for label, images in rows.items()}
    width = max(strip.width for strip in strips.values())
    canvas = Image.new("RGB", (width, sum(s.height + _TEXT_HEIGHT + gap for s in strips.values())), "white")
    pen, top = ImageDraw.Draw(canvas), 0
    for label, strip in strips.items():
        pen.text((2, top + 2), label, fill="black")
        canvas.paste(strip, (0, top + _TEXT_HEIGHT))
        top += strip.height + _TEXT_HEIGHT + gap
    return canvas


def captioned_rows(
    rows: Sequence[Sequence[Image.Image]],
    captions: Sequence[Sequence[str]],
    headings: Sequence[str],
    marked: Mapping[int, str] | None = None,
    gap: int = 4,
) -> Image.Image:
    """Rows of images of one size, each above its caption, in columns with headings; text scales with the images.

    Args:
        marked: the columns to highlight, by number, and the text above their headings.
    """
    width, height = rows[0][0].size
    text_size = min(24, max(10, width // 6))
    font = ImageFont.load_default(size=text_size)
    line, below = round(1.4 * text_size), round(0.35 * text_size)  # height of a line, and its part below the baseline
    top, step = (2 if marked else 1) * line, height + line + gap
    canvas = Image.new("RGB", (len(headings) * (width + gap) - gap, top + len(rows) * step - gap), "white")
    pen = ImageDraw.Draw(canvas)
    middles = [column * (width + gap) + width // 2 for column in range(len(headings))]
    for column, (middle, heading) in enumerate(zip(middles, headings, strict=True)):
        color, mark = (_MARK, marked[column]) if marked and column in marked else (_TEXT, "")
        pen.text((middle, top - below), heading, color, font, anchor="ms")
        pen.text((middle, top - below - line), mark, color, font, anchor="ms")
    for number, (images, texts) in enumerate(zip(rows, captions, strict=True)):
        y = top + number * step
        for middle, image, text in zip(middles, images, texts, strict=True):
            canvas.paste(image, (middle - width // 2, y))
            pen.text((middle, y + height + line - below), text, _TEXT, font, anchor="ms")
    return canvas
