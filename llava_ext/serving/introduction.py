"""The introduction of a model on the demo page, from the card in its folder: what it knows, and example messages.

It is the block `demo` of the YAML header of README.md:

    ---
    demo:
      knows: scenes of one to four colored shapes
      examples:
      - a photo of a red circle
      - text: How many objects are there?
        image: example.png
    ---
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from PIL import Image

from evotok_plugin.common.foreign_files import read_text, reading
from evotok_plugin.errors import UserError
from llava_ext.serving.uploads import UploadLimits, open_upload

CARD = "README.md"
MAX_EXAMPLES = 6
_LONGEST_LINE, _LONGEST_EXAMPLE = 300, 200  # characters
_FORMAT = "see docs/play.md for the format"


@dataclass(frozen=True)
class Example:
    """An example message: its text, and an image to read if it has one."""

    text: str
    image: Image.Image | None = None


@dataclass(frozen=True)
class Introduction:
    """Introduction of a model on the demo page.

    Attributes:
        knows: one line that says what the model knows; empty if its card does not say.
        examples: messages that a visitor can send with one click.
    """

    knows: str = ""
    examples: tuple[Example, ...] = ()


def read_introduction(folder: str | Path) -> Introduction:
    """Read the introduction from a model folder; it is empty if the folder has no card, or the card no block `demo`.

    Raises:
        UserError: the header of the card is not YAML, or the block has unknown keys, wrong values or too many examples,
            or an image that cannot be read.
    """
    folder = Path(folder)
    block = _block(folder)
    if block is None:
        return Introduction()
    with reading(folder / CARD, _FORMAT, "read"):
        fields = _fields(block, "demo", ("knows", "examples"))
        knows, examples = fields.get("knows", ""), fields.get("examples", [])
        if knows != "":
            knows = _line(knows, "demo.knows", _LONGEST_LINE)
        if not isinstance(examples, list) or len(examples) > MAX_EXAMPLES:
            raise UserError(f"demo.examples: expected a list of at most {MAX_EXAMPLES} examples, got {examples!r:.200}")
        return Introduction(knows, tuple(_example(folder, value, n) for n, value in enumerate(examples, 1)))


def copy_introduction(folder: str | Path, output: str | Path) -> str:
    """Copy the images of the introduction to another folder; returns the header for the card there, which may be empty.

    Raises:
        UserError: as `read_introduction`.
    """
    read_introduction(folder)  # validates it
    block = _block(Path(folder))
    if block is None:
        return ""
    for example in block.get("examples", []):
        if isinstance(example, Mapping) and example.get("image") is not None:
            target = Path(output) / example["image"]
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(Path(folder) / example["image"], target)
    return f"---\n{yaml.safe_dump({'demo': block}, sort_keys=False, allow_unicode=True, width=120)}---\n\n"


def _block(folder: Path) -> Any:
    """The value of `demo` in the header of a folder's card; None if there is no such key, header or card."""
    card = folder / CARD
    if not card.is_file():
        return None
    header = _header(read_text(card))
    with reading(card, "correct the YAML header between the two lines ---", "read"):
        values = yaml.safe_load(header)
    return values.get("demo") if isinstance(values, Mapping) else None


def _header(text: str) -> str:
    """The YAML between a first line `---` and the next such line; empty if there is none."""
    first, *lines = text.split("\n")
    if first.rstrip() != "---":
        return ""
    for end, line in enumerate(lines):
        if line.rstrip() == "---":
            return "\n".join(lines[:end])
    return ""


def _example(folder: Path, value: Any, number: int) -> Example:
    name = f"demo.examples, number {number}"
    if isinstance(value, str):
        return Example(_line(value, name, _LONGEST_EXAMPLE))
    fields = _fields(value, name, ("text", "image"))
    text, image = _line(fields.get("text"), f"{name}, text", _LONGEST_EXAMPLE), fields.get("image")
    if image is None:
        return Example(text)
    path = PurePosixPath(image) if isinstance(image, str) else None
    if path is None or path.is_absolute() or ".." in path.parts:
        raise UserError(f"{name}, image: expected the path of an image in the model folder, got {image!r:.200}")
    return Example(text, open_upload(folder / path, UploadLimits(), str(path)))


def _fields(value: Any, name: str, known: tuple[str, ...]) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f"{name}: expected the keys {' and '.join(known)}, got {value!r:.200}")
    unknown = [key for key in value if key not in known]
    if unknown:
        raise UserError(f"{name}: unknown key {unknown[0]!r:.200}; expected {' or '.join(known)}")
    return value


def _line(value: Any, name: str, longest: int) -> str:
    text = " ".join(value.split()) if isinstance(value, str) else ""
    if not 0 < len(text) <= longest:
        raise UserError(f"{name}: expected a text of 1 to {longest} characters, got {value!r:.300}")
    return text
