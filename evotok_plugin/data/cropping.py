"""Crops of resized images, with memory that does not depend on the aspect ratio."""

from PIL import Image

_FULL_RESIZE = 8  # the whole image is resized up to this multiple of the crop's side


def resized_crop(picture: Image.Image, scaled: tuple[int, int], corner: tuple[int, int], size: int) -> Image.Image:
    """Resize a picture to `scaled` (width, height) and return the square of `size` pixels at `corner` (left, top).

    The interpolation is bicubic. If the resized image would be far larger than the crop, only the crop's part of the
    picture is resized. The pixels then differ by rounding and, when shrinking to a quarter or less, by the alignment of
    the blocks of `reducing_gap`.
    """
    (width, height), (left, top) = scaled, corner
    if max(scaled) <= _FULL_RESIZE * size:
        picture = picture.resize(scaled, Image.Resampling.BICUBIC, reducing_gap=2.0)
        return picture.crop((left, top, left + size, top + size))
    columns, rows = picture.width / width, picture.height / height
    right, bottom = min((left + size) * columns, picture.width), min((top + size) * rows, picture.height)
    box = (left * columns, top * rows, right, bottom)
    return picture.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=2.0)
