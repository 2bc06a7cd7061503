"""Files of drawing prompts: text with one prompt per line, or JSONL rows with a prompt and a tag."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evotok_plugin.common.files import user_path
from evotok_plugin.common.foreign_files import reading
from evotok_plugin.errors import UserError


@dataclass(frozen=True)
class Prompt:
    """A drawing prompt.

    Attributes:
        tag: the skill that the prompt belongs to, for tables; empty if the file names none.
    """

    text: str
    tag: str = ""


def read_prompts(paths: Sequence[str | Path]) -> list[Prompt]:
    """Read the prompts of several files, in order and without duplicates.

    A `.jsonl` file has one object per line with `prompt` and optionally `tag`, such as GenEval's metadata; any other
    file has one prompt per line. Empty lines are ignored.

    Raises:
        UserError: a file cannot be read, a row has no prompt, or there are no prompts.
    """
    prompts: dict[str, Prompt] = {}
    for path in map(user_path, map(str, paths)):
        with reading(f"prompts file {path}", "save it as UTF-8 text", "read as text"):
            lines = path.read_text(encoding="utf-8-sig").splitlines()  # a pipe is fine: --prompts <(command)
        read = _from_json if path.suffix.lower() == ".jsonl" else _from_text
        for number, line in enumerate(lines, start=1):
            if line.strip():
                prompt = read(line.strip(), f"{path}:{number}")
                prompts.setdefault(prompt.text, prompt)
    if not prompts:
        raise UserError(f"expected at least one prompt in {', '.join(map(str, paths)) or 'a prompts file'}, got none")
    return list(prompts.values())


def _from_text(line: str, where: str) -> Prompt:
    return Prompt(line)


def _from_json(line: str, where: str) -> Prompt:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: expected a JSON object, got {line:.80} ({error})") from error
    text = row.get("prompt") if isinstance(row, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise UserError(f'{where}: expected an object with a text "prompt", got {line:.80}')
    tag = row.get("tag") or ""
    if not isinstance(tag, str):
        raise UserError(f'{where}: expected a text as "tag", got {tag!r:.80}')
    return Prompt(text.strip(), tag)
