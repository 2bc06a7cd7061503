"""The answers of a drawing model and the images that they name."""

import json
from pathlib import Path

from PIL import Image

from evotok_plugin.data.images import open_picture
from evotok_plugin.errors import UserError

_EXPECTED = 'expected {"text": "", "images": ["/path/to/image.png", ...]} as JSON'


def image_paths(answer: str) -> list[Path]:
    """The image paths in a model's answer; the files may be missing.

    Raises:
        UserError: not the JSON that drawing tasks expect, or no images in it.
    """
    try:
        images = json.loads(answer)["images"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{_EXPECTED}, got {str(answer)[:200]!r}; does this model draw?") from error
    if not isinstance(images, list) or not images or not all(isinstance(path, str) for path in images):
        raise UserError(f"{_EXPECTED}, got {str(answer)[:200]!r}")
    return [Path(path) for path in images]


def parse_images(answer: str) -> list[Path]:
    """The image paths in a model's answer, all of which exist.

    Raises:
        UserError: not the JSON that drawing tasks expect, no images in it, or a missing image (which must not be
            counted as a failed drawing).
    """
    paths = image_paths(answer)
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(paths)} drawn images are missing, first {missing[0]}; if the answers come from "
            "lmms-eval's --use_cache, delete its cache and draw again"
        )
    return paths


def open_image(path: Path) -> Image.Image:
    """Read a drawn image: RGB, complete, upright.

    Raises:
        UserError: the file is missing, not an image, or truncated.
    """
    try:
        return open_picture(path)
    except UserError as error:
        raise UserError(f"drawn image {path} cannot be read; draw it again: {error}") from error
