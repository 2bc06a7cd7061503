"""Drawn images as PNG files that record how they were drawn and never overwrite a different image."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from evotok_plugin.common.files import write_new, write_whole
from evotok_plugin.common.temporary_names import remove_all_abandoned
from evotok_plugin.errors import UserError

_SMALLEST_WIDTH, _LARGEST_SIDE = 256, 16_384  # pixels of an image file


@dataclass(frozen=True)
class Provenance:
    """Record of how an image was drawn, stored in the text chunks of its PNG file.

    Attributes:
        prompt: the text it was drawn for.
        seed: seed of its random numbers.
        model: name of the model's folder, without its path.
        settings: all other settings that the image depends on.
        weights: fingerprint of the content of the model's folder (`folder_fingerprint`).
        scale: whole factor by which the image in the file was enlarged.
    """

    prompt: str
    seed: int
    model: str
    settings: Mapping[str, Any]
    weights: str
    scale: int = 1

    def as_png_text(self) -> dict[str, str]:
        """Text chunks by their keywords, which are the names of the attributes; `settings` as JSON."""
        settings = json.dumps(self.settings, ensure_ascii=False, sort_keys=True)
        texts = {"prompt": self.prompt, "seed": str(self.seed), "model": self.model, "settings": settings}
        return {**texts, "weights": self.weights, "scale": str(self.scale)}


def file_scale(side: int, scale: int | None = None) -> int:
    """The factor by which files enlarge drawn images of `side` x `side` pixels.

    Args:
        scale: the requested factor; by default the smallest whole factor that makes images 256 pixels wide or wider.

    Raises:
        UserError: the factor is below 1, or makes images larger than 16384 pixels per side.
    """
    if scale is None:
        return -(-_SMALLEST_WIDTH // side)
    if not 1 <= scale <= _LARGEST_SIDE // side:
        raise UserError(
            f"--scale must be at least 1 and at most {_LARGEST_SIDE // side} for images of {side} pixels, got {scale}"
        )
    return scale


def write_drawn(image: Image.Image, folder: Path, name: str, provenance: Provenance) -> Path:
    """Write `folder/name.png` and return its path.

    An existing file of that name is replaced only if it has the same provenance; otherwise the new file gets a number
    (`name_2.png`). Processes that draw into one folder at the same time never overwrite each other's images.

    Raises:
        UserError: the file cannot be written.
    """
    text = provenance.as_png_text()
    make_folder(folder)
    return write_new(
        _candidates(folder, name),
        write=lambda part: _save_png(image, part, text),
        is_same=lambda path: read_png_text(path) == text,
    )


def _candidates(folder: Path, name: str) -> Iterator[Path]:
    yield folder / f"{name}.png"
    number = 2
    while True:
        yield folder / f"{name}_{number}.png"
        number += 1


def read_png_text(path: Path) -> dict[str, str] | None:
    """Read the text chunks of a PNG file; None if the file cannot be read as PNG."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            assert isinstance(image, PngImagePlugin.PngImageFile)
            return dict(image.text)
    except (OSError, SyntaxError, ValueError):  # raised by Pillow for files that are not PNG or are damaged
        return None


def write_png(
    image: Image.Image, path: Path, text: Mapping[str, str], prepared: bool = False, compress_level: int = 6
) -> None:
    """Write a PNG file with text chunks atomically.

    Args:
        prepared: whether `prepare_folder` has been called for the file's folder, which is faster for many files.
        compress_level: of zlib; 1 takes a third of the time of 6 and makes files about a fifth larger.

    Raises:
        UserError: the file cannot be written.
    """
    if not prepared:
        make_folder(path.parent)
    write_whole(path, lambda part: _save_png(image, part, text, compress_level), shared=True, tidy=not prepared)


def prepare_folder(folder: Path) -> None:
    """Create a folder for many images, and delete the temporary files that killed processes have left in it.

    Raises:
        UserError: the folder cannot be created or is not writable.
    """
    make_folder(folder)
    remove_all_abandoned(folder)


def _save_png(image: Image.Image, path: Path, text: Mapping[str, str], compress_level: int = 6) -> None:
    info = PngImagePlugin.PngInfo()
    for key, value in text.items():
        info.add_itxt(key, value)
    image.save(path, format="PNG", pnginfo=info, compress_level=compress_level)


def make_folder(folder: Path) -> None:
    """Create a folder for output files.

    Raises:
        UserError: the folder cannot be created or is not writable.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be created: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"the folder {folder} cannot be written to")


def file_name(prompt: str) -> str:
    """Turn a prompt into the stem of a file name: words joined by underscores, at most 60 characters and 180 bytes."""
    name = re.sub(r"\W+", "_", prompt.lower()).strip("_")[:60]
    return name.encode(errors="ignore")[:180].decode(errors="ignore") or "image"
