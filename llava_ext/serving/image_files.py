"""Drawn images as PNG files that say how they were drawn, and that never take another one's place."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, PngImagePlugin, UnidentifiedImageError

from evotok_plugin.common.files import check_output_folder
from evotok_plugin.errors import UserError


@dataclass(frozen=True)
class Provenance:
    """How an image came to be; it stands in the PNG file as text chunks of these names, `settings` as JSON.

    Attributes:
        prompt: what it was drawn for.
        seed: of its random numbers.
        model: name of the model's folder, without where it lies.
        settings: all others that the image depends on.
        weights: fingerprint of the content of the model's folder (`folder_fingerprint`).
    """

    prompt: str
    seed: int
    model: str
    settings: dict
    weights: str

    def as_png_text(self) -> dict[str, str]:
        """The text chunks."""
        settings = json.dumps(self.settings, ensure_ascii=False, sort_keys=True)
        texts = {"prompt": self.prompt, "seed": str(self.seed), "model": self.model, "settings": settings}
        return {**texts, "weights": self.weights}


def write_drawn(image: Image.Image, folder: Path, name: str, provenance: Provenance) -> Path:
    """Write `folder/name.png`, and give the path.

    A file of that name is replaced only where it was drawn with the same prompt, seed, model and settings; beside any
    other one the new file gets a number (`name_2.png`).

    Raises:
        UserError: it cannot be written.
    """
    path = next(path for path in _names(folder, name) if not path.exists() or read_png_text(path) == provenance.as_png_text())
    write_png(image, path, provenance.as_png_text())
    return path


def _names(folder: Path, name: str) -> Iterator[Path]:
    yield folder / f"{name}.png"
    number = 2
    while True:
        yield folder / f"{name}_{number}.png"
        number += 1


def read_png_text(path: Path) -> dict[str, str] | None:
    """The text chunks of a PNG file; None of anything else."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            return dict(image.text)
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError):
        return None


def write_png(image: Image.Image, path: Path, chunks: dict[str, str]) -> None:
    """Write a PNG file with text chunks; it is there whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    info = PngImagePlugin.PngInfo()
    for key, text in chunks.items():
        info.add_itxt(key, text)
    part = path.with_name(f".{path.name}.part")
    make_folder(path.parent)
    try:
        image.save(part, format="PNG", pnginfo=info)
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # what cannot be written cannot always be looked for either
            part.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Make a folder that files will go into.

    Raises:
        UserError: it cannot be made, or not be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be made: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"the folder {folder} cannot be written to")


def check_folder(folder: Path) -> None:
    """Find out whether files can go into a folder before there are any; it is not made yet.

    Raises:
        UserError: it cannot be made, or not be written to.
    """
    check_output_folder(folder)


def file_name(prompt: str) -> str:
    """A prompt as the beginning of a file's name: words between underscores, at most 60 characters and 180 bytes."""
    name = re.sub(r"\W+", "_", prompt.lower()).strip("_")[:60]
    return name.encode(errors="ignore")[:180].decode(errors="ignore") or "image"
