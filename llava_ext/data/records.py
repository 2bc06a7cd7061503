"""LLaVA records: read, checked, and turned into role/content messages. A bad record is named, never replaced."""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

LLAVA_IMAGE = "<image>"
ROLES = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True)
class Record:
    """One conversation. `images` are paths relative to the image folder; `drawn[i]` says that the assistant draws
    image i (it stands in an assistant turn) instead of reading it."""

    id: str
    messages: tuple[dict, ...]
    images: tuple[str, ...] = ()
    drawn: tuple[bool, ...] = ()

    @property
    def kind(self) -> str:
        """One of "text", "read" and "draw" (anything drawn)."""
        return "draw" if any(self.drawn) else "read" if self.images else "text"


@dataclass
class BadSamples:
    """Counts what could not be used, writes it to a report file and stops when there is too much of it."""

    report: Path | None
    limit: float = 0.001
    reasons: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, reason: str) -> None:
        self.reasons[name] = reason

    def check(self, total: int) -> None:
        """Write the report.

        Raises:
            ValueError: more than `limit` (a fraction) of `total` samples are bad.
        """
        if not self.reasons:
            return
        if self.report is not None:
            self.report.parent.mkdir(parents=True, exist_ok=True)
            lines = (json.dumps({"sample": name, "reason": why}) for name, why in self.reasons.items())
            self.report.write_text("\n".join(lines) + "\n")
        if len(self.reasons) > self.limit * total:
            name, why = next(iter(self.reasons.items()))
            where = f"; all are named in {self.report}" if self.report else ""
            raise ValueError(
                f"{len(self.reasons)} of {total} samples are unusable, over the limit of {self.limit:.2%} "
                f"(--max_bad_fraction). First: {name}: {why}{where}"
            )


def read_json_records(path: Path) -> list[dict]:
    """The rows of a LLaVA JSON or JSONL file.

    Raises:
        ValueError: no such file, not JSON, or not a list of objects.
    """
    if not path.is_file():
        raise ValueError(f"data file {path} does not exist; --data_path takes LLaVA JSON or JSONL files")
    try:
        with path.open(encoding="utf-8") as file:
            rows = [json.loads(line) for line in file if line.strip()] if path.suffix == ".jsonl" else json.load(file)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"data file {path} is not valid JSON: {error}") from error
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"data file {path}: expected a non-empty list of records, got {type(rows).__name__}")
    return rows


def parse_record(row: object, image_folder: Path | None) -> Record:
    """One LLaVA row to a `Record`.

    Raises:
        ValueError: no conversations, an unknown speaker, `<image>` and images that do not match, an image path that
            leaves the image folder, or a missing image file.
    """
    if not isinstance(row, dict):
        raise ValueError(f"expected an object with 'conversations', got {type(row).__name__}")
    turns = row.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise ValueError("no 'conversations': expected a list of {'from', 'value'} turns")
    messages = []
    for turn in turns:
        role = ROLES.get(turn.get("from")) if isinstance(turn, dict) else None
        if role is None or not isinstance(turn.get("value"), str):
            raise ValueError(f"turn {len(messages)}: expected {{'from': 'human'|'gpt', 'value': text}}, got {turn!r}")
        messages.append({"role": role, "content": turn["value"]})
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("no 'gpt' turn: there is nothing to learn")
    image = row.get("image", [])
    images = [image] if isinstance(image, str) else list(image or [])
    drawn = [m["role"] == "assistant" for m in messages for _ in range(m["content"].count(LLAVA_IMAGE))]
    if len(drawn) != len(images):
        raise ValueError(f"{len(drawn)} {LLAVA_IMAGE} in the conversation but {len(images)} images; they must match")
    for name in images:
        _check_image_path(name, image_folder)
    return Record(str(row.get("id", "")), tuple(messages), tuple(images), tuple(drawn))


def _check_image_path(name: str, image_folder: Path | None) -> None:
    if image_folder is None:
        raise ValueError(f"image {name!r} but no image folder; pass --image_folder")
    root = os.path.abspath(image_folder)
    path = os.path.abspath(os.path.join(root, name))
    if os.path.commonpath([root, path]) != root:
        raise ValueError(f"image path {name!r} leaves the image folder {image_folder}")
    if not os.path.isfile(path):
        raise ValueError(f"image {name!r} not found in {image_folder}")


def load_records(paths: Sequence[str | Path], image_folder: str | Path | None, bad: BadSamples) -> list[Record]:
    """All usable records of several files; the others go into `bad` (its limit is checked by the caller)."""
    folder = Path(image_folder) if image_folder is not None else None
    records = []
    for path in map(Path, paths):
        for index, row in enumerate(read_json_records(path)):
            name = str(row.get("id", index)) if isinstance(row, dict) else str(index)
            try:
                records.append(parse_record(row, folder))
            except ValueError as error:
                bad.add(f"{path.name}:{name}", str(error))
    return records


def image_names(records: Iterable[Record]) -> list[str]:
    """Every image that the records use, once, in order of first use."""
    return list(dict.fromkeys(name for record in records for name in record.images))
