"""Parsing of messages, in the forms of Hugging Face and OpenAI, to text with image placeholders, and pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jinja2 import TemplateError

from evotok_plugin.data.bad_samples import shorten
from evotok_plugin.data.images import embedded_content, is_embedded, local_file
from evotok_plugin.errors import UserError
from llava_ext.prompts.image_parts import IMAGE_PARTS, picture_in_part
from llava_ext.prompts.placeholders import LLAVA_IMAGE, split_at_images

IMAGE_TOKEN = "<|image_pad|>"
_PART_TYPES = "parts of type 'text', 'image' or 'image_url'"
OTHER_CONTENT = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "audio")


class UnsupportedMessage(UserError, TemplateError):
    """A message that the chat template cannot render, which is a `TemplateError` to callers that probe templates."""


@dataclass(frozen=True)
class Message:
    """A message with one `<|image_pad|>` per image.

    Attributes:
        role: role in the chat template.
        text: the content.
        images: indices of the images' placeholders in `text`; any other `<|image_pad|>` is plain text.
    """

    role: str
    text: str
    images: tuple[int, ...] = ()

    @classmethod
    def of_pieces(cls, role: str, pieces: Sequence[str]) -> "Message":
        """Build a message with an image between adjacent pieces of text."""
        starts: list[int] = []
        end = 0
        for piece in pieces[:-1]:
            starts.append(end + len(piece))
            end = starts[-1] + len(IMAGE_TOKEN)
        return cls(role, IMAGE_TOKEN.join(pieces), tuple(starts))

    def user_spans(self, start: int, end: int) -> list[tuple[int, int]]:
        """Spans (first character, end) of the text between the images, for a content rendered at `start`..`end`.

        A shorter span than the content means that the template trimmed it.
        """
        trimmed = len(self.text) - len(self.text.lstrip()) if end - start < len(self.text) else 0
        spans: list[tuple[int, int]] = []
        first = start
        for image in self.images:
            spans.append((first, start + image - trimmed))
            first = spans[-1][1] + len(IMAGE_TOKEN)
        return [*spans, (first, end)]


def read_messages(messages: Sequence[Mapping]) -> tuple[list[Message], list]:
    """Parse messages `{"role", "content"}` to `Message`s and the pictures of their images, in order.

    A content is a string, in which `<image>` represents an image (see `llava_ext.prompts.placeholders`), or a list of
    parts: `{"type": "text", "text"}` with literal text, `{"type": "image"}` with the picture under "image", "url",
    "path" or "base64", and OpenAI's `{"type": "image_url", "image_url": {"url"}}` (see
    `llava_ext.prompts.image_parts`). Parts are joined by line breaks. The picture of an image without one is None.

    Raises:
        UserError: a malformed message, content under other keys, or a picture that would have to be downloaded.
    """
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise UserError(f"expected a list of messages with 'role' and 'content', got {type(messages).__name__}")
    read: list[Message] = []
    pictures: list = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise UserError(f"message {number}: expected {{'role': ..., 'content': ...}}, got {_kind(message)}")
        name = f"message {number} ({message['role']})"
        if unknown := [key for key in OTHER_CONTENT if message.get(key)]:
            raise UnsupportedMessage(f"{name}: {unknown[0]!r} is not supported; use only 'content'")
        pieces, found = _read_content(message.get("content"), name)
        read.append(Message.of_pieces(message["role"], pieces))
        pictures += found
    return read, pictures


def _read_content(content: object, name: str) -> tuple[list[str], list]:
    if isinstance(content, str):
        texts = split_at_images(content)
        return texts, [None] * (len(texts) - 1)
    if not isinstance(content, (list, tuple)):
        raise UserError(f"{name}: expected a string or a list of parts as 'content', got {_kind(content)}")
    pieces: list[str] = [""]
    pictures: list = []
    for number, part in enumerate(content):
        if number:
            pieces[-1] += "\n"
        if not isinstance(part, Mapping):
            raise UserError(f"{name}: expected {_PART_TYPES}, got {_kind(part)}")
        if part.get("type") in IMAGE_PARTS:
            pieces.append("")
            pictures.append(_picture_of(part, name))
        else:
            pieces[-1] += _text_of(part, name)
    return pieces, pictures


def _text_of(part: Mapping, name: str) -> str:
    if part.get("type") != "text":
        raise UserError(f"{name}: expected {_PART_TYPES}, got type {part.get('type')!r}")
    if not isinstance(part.get("text"), str):
        raise UserError(f"{name}: a text part needs a string under 'text', got {_kind(part.get('text'))}")
    return part["text"]


def _picture_of(part: Mapping, name: str) -> object | None:
    try:
        key, picture = picture_in_part(part)
        return from_base64(picture) if key == "base64" else checked_picture(picture)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def checked_picture(picture: object) -> object:
    """Return a picture after checking that it is local.

    Raises:
        UserError: a URL of a remote file; nothing is downloaded.
    """
    if isinstance(picture, str) and not is_embedded(picture):
        try:
            local_file(picture)
        except UserError as error:
            raise UserError(f"image {shorten(picture)}: {error}") from None
    return picture


def from_base64(text: object) -> bytes:
    """Decode a picture from base64 or from a data URI.

    Raises:
        UserError: neither base64 nor a data URI.
    """
    if not isinstance(text, str):
        raise UserError(f"expected a string under 'base64', got {_kind(text)}")
    try:
        content = embedded_content(text, is_base64=True)
    except UserError as error:
        raise UserError(f"expected the base64 of an image under 'base64': {error}") from None
    assert content is not None
    return content


def check_pictures(pictures: Sequence) -> None:
    """Check that every image has a picture.

    Raises:
        UserError: an image without a picture.
    """
    missing = sum(picture is None for picture in pictures)
    if missing:
        raise UserError(
            f"{len(pictures)} {LLAVA_IMAGE} in the text but {len(pictures) - missing} images were given; give each as "
            '{"type": "image", "image": picture}, and write a literal <image> as a {"type": "text"} part'
        )


def _kind(value: object) -> str:
    return "None" if value is None else type(value).__name__
