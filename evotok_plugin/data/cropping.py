"""Crops of resized images, in memory that does not grow with the aspect ratio."""

from PIL import Image

_FULL_RESIZE = 8  # times the crop's side up to which the whole image is resized


def resized_crop(picture: Image.Image, scaled: tuple[int, int], corner: tuple[int, int], size: int) -> Image.Image:
    """Return the square of `size` pixels at `corner` (left, top) of the picture resized to `scaled` (width, height).

    Bicubic. Where the resized image would be far larger than the crop, only the crop's part of the picture is resized.
    Its pixels then differ by rounding and, when shrinking to a quarter or less, by where `reducing_gap`'s blocks begin.
    """
    (width, height), (left, top) = scaled, corner
    if max(scaled) <= _FULL_RESIZE * size:
        picture = picture.resize(scaled, Image.Resampling.BICUBIC, reducing_gap=2.0)
        return picture.crop((left, top, left + size, top + size))
    columns, rows = picture.width / width, picture.height / height
    right, bottom = min((left + size) * columns, picture.width), min((top + size) * rows, picture.height)
    box = (left * columns, top * rows, right, bottom)
    return picture.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=2.0)
