"""Pictures of pictures: grids and labelled rows."""

from collections.abc import Sequence

from PIL import Image, ImageDraw

_TEXT_HEIGHT = 16


def image_grid(images: Sequence[Image.Image], columns: int, scale: int = 1, gap: int = 4) -> Image.Image:
    """Images of one size, row by row on white; `scale` enlarges small ones without smoothing."""
    width, height = images[0].width * scale, images[0].height * scale
    rows = -(-len(images) // columns)
    canvas = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for index, image in enumerate(images):
        place = ((index % columns) * (width + gap), (index // columns) * (height + gap))
        canvas.paste(image.resize((width, height), Image.Resampling.NEAREST), place)
    return canvas


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


def labelled_strip(images: Sequence[Image.Image], labels: Sequence[str], scale: int = 1, gap: int = 4) -> Image.Image:
    """Images side by side, each under its label."""
    strip = image_grid(images, len(images), scale, gap)
    canvas = Image.new("RGB", (strip.width, strip.height + _TEXT_HEIGHT), "white")
    canvas.paste(strip, (0, _TEXT_HEIGHT))
    pen = ImageDraw.Draw(canvas)
    for index, label in enumerate(labels):
        pen.text((index * (images[0].width * scale + gap) + 2, 2), label, fill="black")
    return canvas
