"""Rows of any source, checked and turned into role/content messages. A bad row is named, never replaced."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llava_ext.placeholders import LLAVA_IMAGE, count_images, escape_images

ROLES = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}
KINDS = ("text", "read", "draw")
CAPTION_TASKS = {"read": ("read",), "draw": ("draw",), "both": ("read", "draw")}
DESCRIBE = "Describe the image."


@dataclass(frozen=True)
class Record:
    """One conversation. `images` are the images' keys: paths relative to the image folder, or names that a source
    gives to what it embeds. `drawn[i]` says that the assistant draws image i instead of reading it: one of an assistant
    turn, unless it is only shown there as it was drawn before."""

    id: str
    messages: tuple[dict, ...]
    images: tuple[str, ...] = ()
    drawn: tuple[bool, ...] = ()

    @property
    def kind(self) -> str:
        """One of `KINDS`: "draw" if anything is drawn, "read" if anything is read."""
        return "draw" if any(self.drawn) else "read" if self.images else "text"


@dataclass(frozen=True)
class RowOptions:
    """How rows are understood.

    Attributes:
        image_folder: where the paths that rows name start from.
        caption_task: what becomes of an image with a caption: it is described ("read"), drawn, or both, which makes
            two records of it.

    Raises:
        ValueError: an unknown task.
    """

    image_folder: Path | None = None
    caption_task: str = "both"

    def __post_init__(self) -> None:
        if self.caption_task not in CAPTION_TASKS:
            raise ValueError(f"caption_task: expected one of {', '.join(CAPTION_TASKS)}, got {self.caption_task!r}")


def parse_row(row: object, options: RowOptions, embedded: Sequence[str] = ()) -> tuple[Record, ...]:
    """One row to its record; a caption to one for each of its tasks.

    A row holds `conversations` (a list of `from`/`value`) or `messages` (of `role`/`content`, the content a string or
    a list of parts), or else a `caption` (or `text`); and `image` or `images`, unless it comes with its images. An
    image in an assistant turn is drawn; `drawn` (a bool an image) says otherwise: false shows one that was drawn
    before, which is read, as it is when a conversation goes on after a drawing.

    Args:
        embedded: keys of the images that come with the row.

    Raises:
        ValueError: no conversation, an unknown speaker, `<image>` and images that do not match, an image path that
            leaves the image folder, or a missing image file.
    """
    if not isinstance(row, dict):
        raise ValueError(f"expected an object with 'conversations', got {type(row).__name__}")
    turns = row["conversations"] if row.get("conversations") is not None else row.get("messages")
    caption = row["caption"] if row.get("caption") is not None else row.get("text")
    if turns is not None:
        conversations = [_messages(turns)]
    elif isinstance(caption, str) and caption.strip():
        conversations = [_about_caption(caption.strip(), task) for task in CAPTION_TASKS[options.caption_task]]
    else:
        raise ValueError("no 'conversations', 'messages' or 'caption': expected a list of {'from', 'value'} turns")
    named = _named_images(row)
    for messages in conversations:
        _check_text(messages)
        _check_counts(messages, len(embedded) or len(named))
    images = tuple(embedded) or tuple(_image_key(name, options.image_folder) for name in named)
    identity = "" if row.get("id") is None else str(row["id"])
    return tuple(Record(identity, messages, images, _drawn(messages, row)) for messages in conversations)


def parse_record(row: object, image_folder: Path | None) -> Record:
    """A LLaVA row as its one record; the errors are those of `parse_row`."""
    (record,) = parse_row(row, RowOptions(image_folder, caption_task="read"))
    return record


def _messages(turns: object) -> tuple[dict, ...]:
    if not isinstance(turns, list) or not turns:
        raise ValueError("no 'conversations': expected a list of {'from', 'value'} or {'role', 'content'} turns")
    messages = []
    for turn in turns:
        speaker, content = _speaker_and_content(turn)
        if speaker not in ROLES or content is None:
            raise ValueError(f"turn {len(messages)}: expected {{'from': 'human'|'gpt', 'value': text}}, got {turn!r}")
        messages.append({"role": ROLES[speaker], "content": content})
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("no 'gpt' turn: there is nothing to learn")
    return tuple(messages)


def _speaker_and_content(turn: object) -> tuple[str | None, str | None]:
    """Who speaks, and what as text; None for what is not understood."""
    if not isinstance(turn, dict):
        return None, None
    speaker = turn["from"] if turn.get("from") is not None else turn.get("role")
    content = turn["value"] if turn.get("value") is not None else turn.get("content")
    if isinstance(content, list):
        parts = [_part(part) for part in content]
        content = None if None in parts else "\n".join(parts)
    return speaker if isinstance(speaker, str) else None, content if isinstance(content, str) else None


def _part(part: object) -> str | None:
    kind = part.get("type") if isinstance(part, dict) else None
    text = part.get("text") if kind == "text" else None
    if kind == "image":
        return LLAVA_IMAGE
    return escape_images(text) if isinstance(text, str) else None  # the text of a part is literal


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
        raise ValueError(f"drawn: expected true or false for each of {len(may)} images, got {said!r}")
    if any(value and not allowed for value, allowed in zip(said, may, strict=True)):
        raise ValueError(f"drawn: {said} says that an image outside the assistant's turns is drawn")
    return tuple(said)


def _check_text(messages: Sequence[dict]) -> None:
    for number, message in enumerate(messages):
        try:
            message["content"].encode()
        except UnicodeEncodeError as error:  # half a surrogate pair, which JSON can spell
            raise ValueError(f"turn {number} is no Unicode text: {error}") from error


def _check_counts(messages: Sequence[dict], num_images: int) -> None:
    found = len(_by_assistant(messages))
    if found != num_images:
        raise ValueError(f"{found} {LLAVA_IMAGE} in the conversation but {num_images} images; they must match")


def _named_images(row: dict) -> list[str]:
    """The paths that a row names: `image` or `images`, one or several, each a string or `{"path": string}`."""
    value = row["images"] if row.get("images") is not None else row.get("image")
    several = value if isinstance(value, list) else [] if value is None else [value]
    names = [name.get("path") if isinstance(name, dict) else name for name in several]
    if wrong := [name for name in names if not isinstance(name, str)]:
        raise ValueError(f"image: expected paths, got a {type(wrong[0]).__name__}")
    return names


def _image_key(name: str, image_folder: Path | None) -> str:
    """The path of an image relative to the image folder, the same for every way to write it."""
    if image_folder is None:
        raise ValueError(f"image {name!r} but no image folder; pass --image_folder")
    root = os.path.abspath(image_folder)
    path = os.path.abspath(os.path.join(root, name))
    if os.path.commonpath([root, path]) != root:
        raise ValueError(f"image path {name!r} leaves the image folder {image_folder}")
    if not os.path.isfile(path):
        raise ValueError(f"image {name!r} not found in {image_folder}")
    return os.path.relpath(path, root)
