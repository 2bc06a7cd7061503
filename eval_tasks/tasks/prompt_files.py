"""Reading of the files in which benchmarks publish their prompts: CSV, JSON, JSONL, parquet."""

import csv
import io
import json
from pathlib import Path
from typing import Any

from evotok_plugin.common.foreign_files import decoded, read_bytes, reading
from evotok_plugin.errors import UserError

_FORMATS = (".csv", ".json", ".jsonl", ".parquet")


def read_rows(path: Path) -> list[dict]:
    """Read the rows of a file; a row of a JSON object gets its key as `id`, unless it has an `id`.

    Raises:
        UserError: a missing or damaged file, another format, or no rows.
    """
    kind = path.suffix.lower()
    if kind not in _FORMATS:
        raise UserError(f"prompts are read from {', '.join(_FORMATS)}, got {path}")
    with reading(f"prompts file {path}", "download it again", "read"):
        content = read_bytes(path)
        if kind == ".parquet":
            import pyarrow.parquet

            rows = pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist()
        else:
            text = decoded(content)
            rows = {".csv": _csv_rows, ".jsonl": _json_lines, ".json": _json_rows}[kind](text)
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"prompts file {path} must hold rows with named columns")
    return rows


def _csv_rows(text: str) -> list[dict]:
    return list(csv.DictReader(text.splitlines(keepends=True)))


def _json_lines(text: str) -> list:
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def _json_rows(text: str) -> list:
    content = json.loads(text)
    if isinstance(content, dict):
        return [{"id": key, **row} if isinstance(row, dict) else row for key, row in content.items()]
    return content if isinstance(content, list) else []


def column(row: dict, names: tuple[str, ...], path: Path) -> Any:
    """The value of the first of several columns that a row has, ignoring case.

    Raises:
        UserError: the row has none of these columns.
    """
    plain = {str(name).strip().lower(): value for name, value in row.items()}
    for name in names:
        if plain.get(name) is not None:
            return plain[name]
    raise UserError(f"prompts file {path} needs a column {' or '.join(map(repr, names))}, got {sorted(plain)}")


def whole_number(value: Any, what: str, path: Path) -> int:
    """A value of a prompts file as an integer; tables often hold integers as `1.0`.

    Args:
        what: for the error: a description of the value.

    Raises:
        UserError: not an integer.
    """
    try:
        return int(float(value))
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(f"prompts file {path}: expected a number as {what}, got {value!r}") from error
