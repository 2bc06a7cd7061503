"""Messages as users and libraries write them, to text with the places of its images, and the pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evotok_plugin.data.bad_samples import shorten
from evotok_plugin.data.images import embedded_content, is_embedded, local_file
from evotok_plugin.errors import UserError
from llava_ext.prompts.image_parts import IMAGE_PARTS, picture_in_part
from llava_ext.prompts.placeholders import LLAVA_IMAGE, split_at_images

IMAGE_TOKEN = "<|image_pad|>"
OTHER_CONTENT = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "audio")


@dataclass(frozen=True)
class Message:
    """A message with one `<|image_pad|>` per image.

    Attributes:
        role: of the chat template.
        text: the content.
        images: where in `text` the images stand; any other `<|image_pad|>` in it is text.
    """

    role: str
    text: str
    images: tuple[int, ...] = ()

    @classmethod
    def of_pieces(cls, role: str, pieces: Sequence[str]) -> "Message":
        """A message with an image between each two pieces of text."""
        places, end = [], 0
        for piece in pieces[:-1]:
            places.append(end + len(piece))
            end = places[-1] + len(IMAGE_TOKEN)
        return cls(role, IMAGE_TOKEN.join(pieces), tuple(places))

    def user_spans(self, start: int, end: int) -> list[tuple[int, int]]:
        """The characters of the text between the images, where the content, possibly trimmed, is rendered."""
        trimmed = len(self.text) - len(self.text.lstrip()) if end - start < len(self.text) else 0
        spans, first = [], start
        for place in self.images:
            spans.append((first, start + place - trimmed))
            first = spans[-1][1] + len(IMAGE_TOKEN)
        return [*spans, (first, end)]


def read_messages(messages: Sequence[Mapping]) -> tuple[list[Message], list]:
    """Messages `{"role", "content"}` to `Message`s and the pictures of their images, in order.

    A content is a string, in which `<image>` stands for an image (see `llava_ext.prompts.placeholders`), or a list of
    parts: `{"type": "text", "text"}`, whose text is taken literally, `{"type": "image"}` with the picture under
    "image", "url", "path" or "base64", and OpenAI's `{"type": "image_url", "image_url": {"url"}}` (see
    `llava_ext.prompts.image_parts`). Parts are joined by line breaks. An image without a picture gives None.

    Raises:
        UserError: a message of another form, with content under other keys, or a picture that would have to be
            downloaded.
    """
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise UserError(f"expected a list of messages with 'role' and 'content', got {type(messages).__name__}")
    read, pictures = [], []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise UserError(f"message {number}: expected {{'role': ..., 'content': ...}}, got {_kind(message)}")
        name = f"message {number} ({message['role']})"
        if unknown := [key for key in OTHER_CONTENT if message.get(key)]:
            raise UserError(f"{name}: {unknown[0]!r} is not supported; put everything into 'content'")
        pieces, found = _read_content(message.get("content"), name)
        read.append(Message.of_pieces(message["role"], pieces))
        pictures += found
    return read, pictures


def _read_content(content: object, name: str) -> tuple[list[str], list]:
    if isinstance(content, str):
        pieces = split_at_images(content)
        return pieces, [None] * (len(pieces) - 1)
    if not isinstance(content, (list, tuple)):
        raise UserError(f"{name}: expected a string or a list of parts as 'content', got {_kind(content)}")
    pieces, pictures = [""], []
    for number, part in enumerate(content):
        text = _text_of(part, name)
        if number:
            pieces[-1] += "\n"
        if text is None:
            pieces.append("")
            pictures.append(_picture_of(part, name))
        else:
            pieces[-1] += text
    return pieces, pictures


def _text_of(part: object, name: str) -> str | None:
    """The text of a text part; None for an image."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in IMAGE_PARTS:
        return None
    if kind != "text":
        what = f"type {kind!r}" if isinstance(part, Mapping) else _kind(part)
        raise UserError(f"{name}: expected parts of type 'text', 'image' or 'image_url', got {what}")
    if not isinstance(part.get("text"), str):
        raise UserError(f"{name}: a text part needs a string under 'text', got {_kind(part.get('text'))}")
    return part["text"]


def _picture_of(part: Mapping, name: str) -> object | None:
    try:
        key, picture = picture_in_part(part)
        return from_base64(picture) if key == "base64" else checked_picture(picture)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error


def checked_picture(picture: object) -> object:
    """Pass a picture on to the image processor.

    Raises:
        UserError: a URL of something that is not on this machine; nothing is downloaded.
    """
    if isinstance(picture, str) and not is_embedded(picture):
        try:
            local_file(picture)
        except ValueError as error:
            raise UserError(f"image {shorten(picture)}: {error}") from None
    return picture


def from_base64(text: object) -> bytes:
    """Decode a picture that is given as base64 or as a data URI.

    Raises:
        UserError: neither of them.
    """
    if not isinstance(text, str):
        raise UserError(f"expected a string under 'base64', got {_kind(text)}")
    try:
        return embedded_content(text, is_base64=True)
    except ValueError as error:
        raise UserError(f"expected the base64 of an image under 'base64': {error}") from None


def check_pictures(pictures: Sequence) -> None:
    """Raises:
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
