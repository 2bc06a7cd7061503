"""Pictures of pictures: grids and labelled rows."""

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

_TEXT_HEIGHT = 16
_TEXT, _MARK = "#222222", "#0072B2"


def image_grid(images: Sequence[Image.Image], columns: int, scale: int = 1, gap: int = 4) -> Image.Image:
    """Images of one size, row by row on white; `scale` enlarges small ones without smoothing."""
    width, height = images[0].width * scale, images[0].height * scale
    rows = -(-len(images) // columns)
    canvas = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for index, image in enumerate(images):
        place = ((index % columns) * (width + gap), (index // columns) * (height + gap))
        canvas.paste(image.resize((width, height), Image.Resampling.NEAREST), place)
    return canvas


def picture_suffixes() -> list[str]:
    """The suffixes of image files that can be written."""
    Image.init()
    return [suffix for suffix, name in Image.registered_extensions().items() if name in Image.SAVE]


def labelled_rows(rows: dict[str, Sequence[Image.Image]], scale: int = 1, gap: int = 4) -> Image.Image:
    """One row of images a label, the label above its row."""
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
    """Rows of images of one size, each image over its caption, each column under its heading; text grows with the
    images.

    Args:
        marked: columns to point out by number, and what to write above their headings.
    """
    width, height = rows[0][0].size
    font = ImageFont.load_default(size=min(24, max(10, width // 6)))
    line, below = round(1.4 * font.size), round(0.35 * font.size)  # of text, and what of it hangs under the baseline
    top, step = (2 if marked else 1) * line, height + line + gap
    canvas = Image.new("RGB", (len(headings) * (width + gap) - gap, top + len(rows) * step - gap), "white")
    pen = ImageDraw.Draw(canvas)
    middles = [column * (width + gap) + width // 2 for column in range(len(headings))]
    for column, (middle, heading) in enumerate(zip(middles, headings, strict=True)):
        colour, mark = (_MARK, marked[column]) if marked and column in marked else (_TEXT, "")
        pen.text((middle, top - below), heading, colour, font, anchor="ms")
        pen.text((middle, top - below - line), mark, colour, font, anchor="ms")
    for number, (images, texts) in enumerate(zip(rows, captions, strict=True)):
        y = top + number * step
        for middle, image, text in zip(middles, images, texts, strict=True):
            canvas.paste(image, (middle - width // 2, y))
            pen.text((middle, y + height + line - below), text, _TEXT, font, anchor="ms")
    return canvas
