"""Rows of any source, checked and turned into role/content messages. A bad row is named, never replaced."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from evotok_plugin.data.bad_samples import shorten
from evotok_plugin.data.files import local_path
from evotok_plugin.errors import UserError
from llava_ext.data.named_images import NamedImage, find_image, image_names
from llava_ext.prompts.image_parts import IMAGE_PARTS, is_empty, picture_in_part
from llava_ext.prompts.placeholders import LLAVA_IMAGE, count_images, escape_images

ROLES = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}
KINDS = ("text", "read", "draw")
CAPTION_TASKS = {"read": ("read",), "draw": ("draw",), "both": ("read", "draw")}
DESCRIBE = "Describe the image."
TURNS, CAPTIONS = ("conversations", "messages"), ("caption", "text")
UNSUPPORTED = ("video", "videos", "audio", "audios")


@dataclass(frozen=True)
class Record:
    """One conversation. `images` are the images' keys: paths relative to the image folder, or names that a source
    gives to what it embeds. `drawn[i]` says that the assistant draws image i instead of reading it: one of an assistant
    turn, unless it is only shown there as it was drawn before. `stamps` tell the state of the images (`stamp_of`)."""

    id: str
    messages: tuple[dict, ...]
    images: tuple[str, ...] = ()
    drawn: tuple[bool, ...] = ()
    stamps: tuple[bytes, ...] = field(default=(), compare=False, repr=False)

    @property
    def kind(self) -> str:
        """One of `KINDS`: "draw" if anything is drawn, "read" if anything is read."""
        return "draw" if any(self.drawn) else "read" if self.images else "text"

    @property
    def reads(self) -> bool:
        """Whether an image is read, be anything drawn or not."""
        return not all(self.drawn)


@dataclass(frozen=True)
class RowOptions:
    """How rows are understood.

    Attributes:
        image_folder: where the paths that rows name start from.
        caption_task: what becomes of an image with a caption: it is described ("read"), drawn, or both, which makes
            two records of it.

    Raises:
        UserError: an unknown task.
    """

    image_folder: Path | None = None
    caption_task: str = "both"

    def __post_init__(self) -> None:
        if self.caption_task not in CAPTION_TASKS:
            raise UserError(f"caption_task: expected one of {', '.join(CAPTION_TASKS)}, got {self.caption_task!r}")
        if self.image_folder is not None:
            object.__setattr__(self, "image_folder", Path(local_path(str(self.image_folder))))


def parse_row(
    row: object, options: RowOptions, embedded: Sequence[str] = (), stamps: Sequence[bytes] = ()
) -> tuple[Record, ...]:
    """One row to its record; a caption to one for each of its tasks.

    A row holds `conversations` (a list of `from`/`value`) or `messages` (of `role`/`content`, the content a string or
    a list of parts), or else a `caption` (or `text`); and `image` or `images`, unless it comes with its images. Fields
    that are empty count as absent. An image in an assistant turn is drawn; `drawn` (a bool an image) says otherwise:
    false shows one that was drawn before, which is read, as it is when a conversation goes on after a drawing.

    Args:
        embedded: keys of the images that come with the row, and `stamps` their stamps.

    Raises:
        UserError: no conversation, an unknown speaker, `<image>` and images that do not match, an image path that
            leaves the image folder, a missing image file, or a video or sound.
    """
    row = _checked(row)
    turns = _turns_of(row)
    caption = next((row[name] for name in CAPTIONS if not is_empty(row.get(name))), None)
    if turns is not None:
        conversations = [_messages(turns)]
    elif isinstance(caption, str):
        conversations = [_about_caption(caption.strip(), task) for task in CAPTION_TASKS[options.caption_task]]
    else:
        raise UserError("no 'conversations', 'messages' or 'caption': expected a list of {'from', 'value'} turns")
    names = [] if embedded else image_names(row, _images_in_parts(turns))
    for messages in conversations:
        _check_text(messages)
        _check_counts(messages, len(embedded) or len(names))
    found = [find_image(name, options.image_folder) for name in names]
    images = tuple(embedded) or tuple(image.key for image in found)
    stamps = tuple(stamps) if embedded else tuple(image.stamp for image in found)
    identity = "" if row.get("id") is None else str(row["id"])
    return tuple(Record(identity, messages, images, _drawn(messages, row), stamps) for messages in conversations)


def named_image(row: object, options: RowOptions, number: int) -> NamedImage:
    """Image `number` of those that a row names.

    Raises:
        UserError: as `parse_row` raises it.
    """
    row = _checked(row)
    return find_image(image_names(row, _images_in_parts(_turns_of(row)))[number], options.image_folder)


def parse_record(row: object, image_folder: Path | None) -> Record:
    """A LLaVA row as its one record; the errors are those of `parse_row`."""
    (record,) = parse_row(row, RowOptions(image_folder, caption_task="read"))
    return record


def _checked(row: object) -> dict:
    if not isinstance(row, dict):
        raise UserError(f"expected an object with 'conversations', got {type(row).__name__}")
    for name in UNSUPPORTED:
        if not is_empty(row.get(name)):
            raise UserError(f"the row has {name!r}, which is not supported; only text and images are")
    return row


def _turns_of(row: dict) -> object:
    """The conversation of a row, None if it has none. Data sets also hold it as JSON text, or as lists by field."""
    turns = next((row[name] for name in TURNS if not is_empty(row.get(name))), None)
    if isinstance(turns, str):
        try:
            turns = json.loads(turns)
        except (ValueError, RecursionError) as error:
            raise UserError(f"'conversations' is text that is not JSON: {error}") from error
    if isinstance(turns, dict) and turns and all(isinstance(values, list) for values in turns.values()):
        if len({len(values) for values in turns.values()}) == 1:
            turns = [dict(zip(turns, values, strict=True)) for values in zip(*turns.values(), strict=True)]
    return turns


def _messages(turns: object) -> tuple[dict, ...]:
    if not isinstance(turns, list) or not turns:
        raise UserError("no 'conversations': expected a list of {'from', 'value'} or {'role', 'content'} turns")
    messages = []
    for turn in turns:
        speaker, content = _speaker_and_content(turn)
        if speaker not in ROLES or content is None:
            raise UserError(
                f"turn {len(messages)}: expected {{'from': 'human'|'gpt', 'value': text}}, got {shorten(turn)}"
            )
        if ROLES[speaker] == "assistant" and not content.strip():
            raise UserError(f"turn {len(messages)}: the answer of {speaker!r} is empty")
        messages.append({"role": ROLES[speaker], "content": content})
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError("no 'gpt' turn: there is nothing to learn")
    return tuple(messages)


def _speaker_and_content(turn: object) -> tuple[str | None, str | None]:
    """Who speaks, and the content as text; None for what is not understood."""
    if not isinstance(turn, dict):
        return None, None
    speaker, content = (_first_of(turn, *names) for names in (("from", "role"), ("value", "content")))
    if isinstance(content, list):
        parts = [_part(part) for part in content]
        content = None if None in parts else "\n".join(parts)
    return speaker if isinstance(speaker, str) else None, content if isinstance(content, str) else None


def _first_of(turn: dict, *names: str) -> object:
    return next((turn[name] for name in names if turn.get(name) is not None), None)


def _part(part: object) -> str | None:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in IMAGE_PARTS:
        return LLAVA_IMAGE
    text = part.get("text") if kind == "text" else None
    return escape_images(text) if isinstance(text, str) else None  # the text of a part is literal


def _images_in_parts(turns: object) -> list[object]:
    """The images that parts of messages name themselves, as `picture_in_part` finds them.

    Raises:
        UserError: a part with several of them.
    """
    contents = [_first_of(turn, "value", "content") for turn in turns if isinstance(turn, dict)] if turns else []
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
    found = [picture_in_part(part) for part in parts if part.get("type") in IMAGE_PARTS]
    return [None if picture is None else {key: picture} for key, picture in found]


def _about_caption(caption: str, task: str) -> tuple[dict, ...]:
    caption = escape_images(caption)
    ask, answer = (f"{LLAVA_IMAGE}\n{DESCRIBE}", caption) if task == "read" else (caption, LLAVA_IMAGE)
    return {"role": "user", "content": ask}, {"role": "assistant", "content": answer}


def _by_assistant(messages: Sequence[dict]) -> tuple[bool, ...]:
    return tuple(m["role"] == "assistant" for m in messages for _ in range(count_images(m["content"])))


def _drawn(messages: Sequence[dict], row: dict) -> tuple[bool, ...]:
    may, said = _by_assistant(messages), row.get("drawn")
    if said is None:
        return may
    if not isinstance(said, list) or [type(value) for value in said] != [bool] * len(may):
        raise UserError(f"drawn: expected true or false for each of {len(may)} images, got {shorten(said)}")
    if any(value and not allowed for value, allowed in zip(said, may, strict=True)):
        raise UserError(f"drawn: {said} says that an image outside the assistant's turns is drawn")
    return tuple(said)


def _check_text(messages: Sequence[dict]) -> None:
    for number, message in enumerate(messages):
        try:
            message["content"].encode()
        except UnicodeEncodeError as error:  # half a surrogate pair, which JSON can spell
            raise UserError(f"turn {number} is not valid Unicode: {error}") from error
        for tag in ("<video>", "<audio>"):
            if tag in message["content"]:
                raise UserError(f"turn {number} holds {tag}, which is not supported; only text and images are")


def _check_counts(messages: Sequence[dict], num_images: int) -> None:
    found = len(_by_assistant(messages))
    if found != num_images:
        remedy = (
            "'image' and 'images' are missing or empty; write \\<image> for the text <image>"
            if not num_images
            else f"write {LLAVA_IMAGE} where each image belongs"
        )
        raise UserError(
            f"{found} {LLAVA_IMAGE} in the conversation but {num_images} images; they must match ({remedy})"
        )
