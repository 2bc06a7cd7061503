"""What a drawing model answers, and the images that it names."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, ImageFile, ImageOps

_LOCK = threading.Lock()  # for Pillow's switch, which all threads share
_EXPECTED = 'expected {"text": "", "images": ["/path/to/image.png", ...]} as JSON'


def image_paths(answer: str) -> list[Path]:
    """The image paths of a model's answer, existing or not.

    Raises:
        ValueError: not the JSON that drawing tasks expect, or no image in it.
    """
    try:
        images = json.loads(answer)["images"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{_EXPECTED}, got {answer[:200]!r}; does this model draw?") from error
    if not isinstance(images, list) or not images or not all(isinstance(path, str) for path in images):
        raise ValueError(f"{_EXPECTED}, got {answer[:200]!r}")
    return [Path(path) for path in images]


def parse_images(answer: str) -> list[Path]:
    """The image paths of a model's answer.

    Raises:
        ValueError: not the JSON that drawing tasks expect, or no image in it.
        FileNotFoundError: an image is missing; it is never counted as a failed drawing.
    """
    paths = image_paths(answer)
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(paths)} drawn images are gone, first {missing[0]}; if the answers come from "
            "lmms-eval's --use_cache, delete that cache and draw again"
        )
    return paths


def open_image(path: Path) -> Image.Image:
    """Read an RGB image whole, upright.

    Raises:
        ValueError: the file is missing, no image, or truncated.
    """
    try:
        with _whole_images_only(), Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except OSError as error:
        raise ValueError(f"drawn image {path} cannot be read ({error}); draw it again") from error


@contextmanager
def _whole_images_only() -> Iterator[None]:
    """Parts of lmms-eval tell Pillow to fill up truncated images with grey, which would be judged as a bad drawing."""
    with _LOCK:
        filled, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = filled
