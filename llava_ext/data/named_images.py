"""Images that a row refers to: files in the image folder, or base64 content in the row itself."""

import base64
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evotok_plugin.data.bad_samples import shorten
from evotok_plugin.data.files import content_digest, existing, read_file, stamp_of
from evotok_plugin.data.images import embedded_content, is_embedded, local_file
from evotok_plugin.errors import UserError
from llava_ext.prompts.image_parts import is_empty, picture_in_part

_REMEMBERED = 1 << 15  # images of a source, about 20 MB


@dataclass(frozen=True)
class NamedImage:
    """An image that a row refers to.

    Attributes:
        key: its path relative to the image folder, or a digest of its content if the row holds it.
        stamp: its place and state (`stamp_of`).
        path: its file, unless the row holds it.
        data: its content, if the row holds it.
    """

    key: str
    stamp: bytes
    path: str = ""
    data: bytes | None = None

    def content(self) -> bytes:
        """The content of the image file.

        Raises:
            UserError: the file cannot be read.
        """
        return read_file(self.path, self.key) if self.data is None else self.data


def image_names(row: dict, in_parts: Sequence[object] = ()) -> list[str]:
    """The images that a row refers to in `image`, in `images` or in the parts of its messages.

    Each is a string or an object that holds one (`picture_in_part`). Empty fields count as absent.

    Args:
        in_parts: values found in the parts of messages.

    Raises:
        UserError: fields contradict each other, or a value is not a reference to an image.
    """
    fields = {field: row.get(field) for field in ("images", "image")}
    given = {field: _as_names(value, field) for field, value in fields.items() if not is_empty(value)}
    if not is_empty(in_parts):
        given["messages"] = _as_names(list(in_parts), "messages")
    named = list(given.items())
    for field, names in named[1:]:
        if names != named[0][1]:
            raise UserError(
                f"{named[0][0]!r} and {field!r} name different images ({shorten(named[0][1])} and {shorten(names)}); "
                "keep one of them"
            )
    return named[0][1] if named else []


def _as_names(value: object, field: str) -> list[str]:
    several = value if isinstance(value, list) else [value]
    names = []
    for number, one in enumerate(several):
        try:
            key, name = picture_in_part(one) if isinstance(one, dict) else ("", one)
        except UserError as error:
            raise UserError(f"{field}: image {number} of {len(several)}: {error}") from None
        if isinstance(name, bytes):
            key, name = "base64", base64.b64encode(name).decode()
        if key == "base64" and isinstance(name, str) and not is_embedded(name):
            name = f"data:;base64,{name}"  # base64 that is not recognized by its first characters
        if is_empty(name):
            raise UserError(f"{field}: image {number} of {len(several)} is empty")
        if not isinstance(name, str):
            raise UserError(f"{field}: expected paths, got {type(name).__name__}")
        names.append(name)
    return names


def find_image(name: str, image_folder: Path | None, key_root: Path | None = None) -> NamedImage:
    """Find an image by a path relative to the image folder or absolute within it, a `file:` URL, a data URI or base64.

    All spellings of the path of a file give the same key.

    Args:
        key_root: folder that the key is relative to, by default the image folder.

    Raises:
        UserError: the image does not exist, the image folder is missing, the path is outside of it, or base64 cannot
            be decoded.
    """
    try:
        content = embedded_content(name)
        local = local_file(name) if content is None else ""
    except UserError as error:
        raise UserError(f"image {shorten(name)}: {error}") from None
    if content is not None:
        key = f"base64-{content_digest(content).hex()}"
        return NamedImage(key, stamp_of(key), data=content)
    if image_folder is None:
        raise UserError(f"image {shorten(name)}: no image folder; pass --image_folder")
    if "\0" in local:
        raise UserError(f"image {shorten(name)} not found in {image_folder}: its name contains a NUL character")
    try:
        os.fsencode(local)
    except UnicodeEncodeError as error:
        raise UserError(
            f"image {shorten(name)} not found in {image_folder}: its name is not valid Unicode ({error.reason})"
        ) from error
    root = os.path.abspath(image_folder)
    path = _existing(root, local)
    if path is None:
        _check_inside(os.path.abspath(os.path.join(root, local)), root, name, image_folder)
        raise UserError(f"image {shorten(name)} not found in {image_folder}")
    root, path = _check_inside(path, root, name, image_folder)
    try:
        facts = os.stat(path)
    except OSError as error:
        raise UserError(f"image {shorten(name)} in {image_folder} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(facts.st_mode):
        raise UserError(f"image {shorten(name)} in {image_folder} is a folder, a pipe or a device; expected a file")
    state = (facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)
    root = root if key_root is None else os.path.abspath(key_root)
    return NamedImage(os.path.relpath(path, root), stamp_of(path, *state), path)


class ImageFinder:
    """`find_image` for the rows of a source, which remembers the first images: many rows can name the same one.

    Its file is looked at only the first time, so a file that changes while a run reads its data keeps its stamp.
    """

    def __init__(self, image_folder: Path | None = None, key_root: Path | None = None) -> None:
        self._folders = image_folder, key_root
        self._found: dict[str, NamedImage] = {}

    def __call__(self, name: str) -> NamedImage:
        """The image of a name; errors as in `find_image`."""
        image = self._found.get(name)
        if image is None:
            image = find_image(name, *self._folders)
            if image.data is None and len(self._found) < _REMEMBERED:
                self._found[name] = image
        return image


def _existing(root: str, name: str) -> str | None:
    """The path of a file as written, in another Unicode normal form, or with Windows path separators; None if it does
    not exist."""
    for one in (name, name.replace("\\", "/")):
        path = os.path.abspath(os.path.join(root, one))
        if os.path.exists(path):
            return path
        if found := existing("", path):
            return found if os.path.exists(found) else None
    return None


def _check_inside(path: str, root: str, name: str, image_folder: Path) -> tuple[str, str]:
    """The image folder and the path within it; links are resolved only if the path is outside the folder otherwise."""
    for folder, file in ((root, path), (os.path.realpath(root), os.path.realpath(path))):
        if os.path.commonpath([folder, file]) == folder:
            return folder, file
    raise UserError(f"image path {shorten(name)} is outside the image folder {image_folder}")
