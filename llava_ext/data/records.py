"""Rows of any source, validated and converted to role/content messages. A bad row is reported, never replaced."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from evotok_plugin.data.bad_samples import shorten
from evotok_plugin.data.files import local_path
from evotok_plugin.errors import UserError
from llava_ext.data.descriptions import check_share, drawing_of, is_chosen, is_description
from llava_ext.data.named_images import ImageFinder, NamedImage, image_names
from llava_ext.prompts.image_parts import IMAGE_PARTS, is_empty, picture_in_part
from llava_ext.prompts.placeholders import LLAVA_IMAGE, count_images, escape_images

ROLES = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}
KINDS = ("text", "read", "draw")  # of records; a number in arrays is an index into this
CAPTION_TASKS = {"read": ("read",), "draw": ("draw",), "both": ("read", "draw")}
DESCRIBE = "Describe the image."
TURNS, CAPTIONS = ("conversations", "messages"), ("caption", "text")
UNSUPPORTED = ("video", "videos", "audio", "audios")


@dataclass(frozen=True)
class Record:
    """One conversation.

    Attributes:
        images: keys of the images: paths relative to the image folder, or names that the source gives to embedded
            images.
        drawn: for each image, whether the assistant draws it instead of reading it. Images of assistant turns are
            drawn, except those that a turn only repeats from earlier.
        stamps: for each image, its place and state (`stamp_of`).
        is_from_description: whether the record draws the image of a conversation that describes it.
    """

    id: str
    messages: tuple[dict, ...]
    images: tuple[str, ...] = ()
    drawn: tuple[bool, ...] = ()
    stamps: tuple[bytes, ...] = field(default=(), compare=False, repr=False)
    is_from_description: bool = False

    @property
    def kind(self) -> str:
        """One of `KINDS`: "draw" if any image is drawn, else "read" if any image is read, else "text"."""
        return "draw" if any(self.drawn) else "read" if self.images else "text"

    @property
    def reads(self) -> bool:
        """Whether any image is read; a record that draws can read as well."""
        return not all(self.drawn)


@dataclass(frozen=True)
class RowOptions:
    """Options for converting rows to records.

    Attributes:
        image_folder: base folder of the image paths in rows.
        caption_task: the task of an image with a caption: "read" describes the image, "draw" draws it, "both" makes a
            record of each.
        draw_share: share of the conversations that describe an image (`descriptions.is_description`) that give a
            second record, which draws it.
        key_root: folder that the keys of images are relative to, if not `image_folder`: with several image folders one
            that contains all of them, so that images of equal names have different keys.
        find_image: finds the images that rows name, with these folders.

    Raises:
        UserError: an unknown task, or a share outside 0 to 1.
    """

    image_folder: Path | None = None
    caption_task: str = "both"
    draw_share: float = 0.0
    key_root: Path | None = None
    find_image: ImageFinder = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.caption_task not in CAPTION_TASKS:
            raise UserError(f"caption_task: expected one of {', '.join(CAPTION_TASKS)}, got {self.caption_task!r}")
        check_share(self.draw_share)
        if self.image_folder is not None:
            object.__setattr__(self, "image_folder", Path(local_path(str(self.image_folder))))
        object.__setattr__(self, "find_image", ImageFinder(self.image_folder, self.key_root))


def parse_row(
    row: object, options: RowOptions, embedded: Sequence[str] = (), stamps: Sequence[bytes] = ()
) -> tuple[Record, ...]:
    """Convert a row to its record, a caption to one record per task, or a description to one that reads and one that
    draws.

    A row has `conversations` (a list of `from`/`value`) or `messages` (of `role`/`content`; the content is a string or
    a list of parts), or else a `caption` (or `text`); and `image` or `images`, unless its images are embedded. Empty
    fields count as absent. An image in an assistant turn is drawn, unless the row has `drawn`, a list of one bool per
    image: false for an image that was drawn earlier and is now read, so that a conversation can continue after a
    drawing.

    Args:
        embedded: keys of the images that the source holds with the row.
        stamps: the stamps of these images.

    Raises:
        UserError: the row has no conversation, an unknown speaker, unequal numbers of `<image>` and images, an image
            path outside the image folder, a missing image file, or video or audio.
    """
    fields = _checked(row)
    turns = _turns_of(fields)
    caption = next((fields[name] for name in CAPTIONS if not is_empty(fields.get(name))), None)
    if turns is not None:
        conversations = [_messages(turns)]
    elif isinstance(caption, str):
        conversations = [_about_caption(caption.strip(), task) for task in CAPTION_TASKS[options.caption_task]]
    else:
        raise UserError("no 'conversations', 'messages' or 'caption': expected a list of {'from', 'value'} turns")
    names = [] if embedded else image_names(fields, _images_in_parts(turns))
    for messages in conversations:
        _check_text(messages)
        _check_counts(messages, len(embedded) or len(names))
    found = [options.find_image(name) for name in names]
    images = tuple(embedded) or tuple(image.key for image in found)
    stamps = tuple(stamps) if embedded else tuple(image.stamp for image in found)
    identity = "" if fields.get("id") is None else str(fields["id"])
    records = [Record(identity, messages, images, _drawn(messages, fields), stamps) for messages in conversations]
    if turns is not None and options.draw_share:
        records += _drawings(records[0], options.draw_share)
    return tuple(records)


def _drawings(record: Record, share: float) -> list[Record]:
    """The record that draws the image which a record describes, if it is among the share; otherwise none."""
    if not is_description(record.messages) or not is_chosen(record.messages[-1]["content"], record.images[0], share):
        return []
    messages = drawing_of(record.messages)
    return [Record(record.id, messages, record.images, (True,), record.stamps, is_from_description=True)]


def named_image(row: object, options: RowOptions, number: int) -> NamedImage:
    """Image `number` of the images that a row names.

    Raises:
        UserError: as in `parse_row`.
    """
    fields = _checked(row)
    names = image_names(fields, _images_in_parts(_turns_of(fields)))
    return options.find_image(names[number])


def description_in(row: object) -> tuple[tuple[dict, ...], str] | None:
    """The messages of a row that describes an image (`descriptions.is_description`) and the name of the image.

    The image is not looked up. None for any other row, also for one that is not usable.
    """
    try:
        fields = _checked(row)
        turns = _turns_of(fields)
        messages = _messages(turns)
        names = image_names(fields, _images_in_parts(turns))
    except UserError:
        return None
    is_one = len(names) == 1 and fields.get("drawn") is None
    return (messages, names[0]) if is_one and is_description(messages) else None


def parse_record(row: object, image_folder: Path | None) -> Record:
    """Convert a LLaVA row to its only record; errors are those of `parse_row`."""
    (record,) = parse_row(row, RowOptions(image_folder, caption_task="read"))
    return record


def _checked(row: object) -> dict:
    if not isinstance(row, dict):
        raise UserError(f"expected an object with 'conversations', got {type(row).__name__}")
    for name in UNSUPPORTED:
        if not is_empty(row.get(name)):
            raise UserError(f"the row has {name!r}; only text and images are supported")
    return row


def _turns_of(row: dict) -> object:
    """The conversation of a row, or None. Some data sets store it as JSON text, or as one list per field."""
    turns = next((row[name] for name in TURNS if not is_empty(row.get(name))), None)
    if isinstance(turns, str):
        try:
            turns = json.loads(turns)
        except (ValueError, RecursionError) as error:
            raise UserError(f"'conversations' is text that is not valid JSON: {error}") from error
    if isinstance(turns, dict) and turns and all(isinstance(values, list) for values in turns.values()):
        if len({len(values) for values in turns.values()}) == 1:
            turns = [dict(zip(turns, values, strict=True)) for values in zip(*turns.values(), strict=True)]
    return turns


def _messages(turns: object) -> tuple[dict, ...]:
    if not isinstance(turns, list) or not turns:
        raise UserError("no 'conversations': expected a list of {'from', 'value'} or {'role', 'content'} turns")
    messages: list[dict] = []
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
        raise UserError("no 'gpt' turn: nothing to learn")
    return tuple(messages)


def _speaker_and_content(turn: object) -> tuple[str | None, str | None]:
    """The speaker of a turn and its content as text; None for a value of an unexpected form."""
    if not isinstance(turn, dict):
        return None, None
    speaker, content = (_first_of(turn, *names) for names in (("from", "role"), ("value", "content")))
    if isinstance(content, list):
        parts = [_part(part) for part in content]
        known = [part for part in parts if part is not None]
        content = "\n".join(known) if len(known) == len(parts) else None
    return speaker if isinstance(speaker, str) else None, content if isinstance(content, str) else None


def _first_of(turn: dict, *names: str) -> object:
    return next((turn[name] for name in names if turn.get(name) is not None), None)


def _part(part: object) -> str | None:
    """A part of a message as text, with `<image>` for an image; None for a part of another type."""
    if not isinstance(part, dict):
        return None
    if part.get("type") in IMAGE_PARTS:
        return LLAVA_IMAGE
    text = part.get("text") if part.get("type") == "text" else None
    return escape_images(text) if isinstance(text, str) else None  # <image> in the text of a part is literal


def _images_in_parts(turns: object) -> list[object]:
    """The images that the parts of messages hold or name, as found by `picture_in_part`.

    Raises:
        UserError: a part has several images.
    """
    dicts = [turn for turn in turns if isinstance(turn, dict)] if isinstance(turns, Iterable) else []
    contents = [_first_of(turn, "value", "content") for turn in dicts]
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
    by_assistant, given = _by_assistant(messages), row.get("drawn")
    if given is None:
        return by_assistant
    if not isinstance(given, list) or [type(value) for value in given] != [bool] * len(by_assistant):
        raise UserError(f"drawn: expected true or false for each of {len(by_assistant)} images, got {shorten(given)}")
    if any(value and not allowed for value, allowed in zip(given, by_assistant, strict=True)):
        raise UserError(f"drawn: {given} is true for an image outside the assistant's turns")
    return tuple(given)


def _check_text(messages: Sequence[dict]) -> None:
    for number, message in enumerate(messages):
        try:
            message["content"].encode()
        except UnicodeEncodeError as error:  # an unpaired surrogate, which JSON allows
            raise UserError(f"turn {number} is not valid Unicode: {error}") from error
        for tag in ("<video>", "<audio>"):
            if tag in message["content"]:
                raise UserError(f"turn {number} contains {tag}; only text and images are supported")


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
