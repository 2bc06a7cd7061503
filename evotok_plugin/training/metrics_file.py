"""The file `metrics.jsonl` of a run: one JSON object per log entry, each with its `step`, none of them twice."""

import json
import time
from pathlib import Path
from typing import Any

from evotok_plugin.common.files import write_text, writing

METRICS = "metrics.jsonl"


def append_metrics(folder: Path, step: int, values: dict[str, Any]) -> None:
    """Append an entry with its step and the time.

    Raises:
        UserError: the file system refuses.
    """
    line = json.dumps({"step": step, "time": round(time.time(), 2), **values})
    path = folder / METRICS
    with writing(path), path.open("a") as file:
        file.write(line + "\n")


def cut_metrics(folder: Path, step: int | None) -> None:
    """Remove the entries that a run resumed after `step` writes again, and a line that a kill has cut off.

    Args:
        step: the step of the checkpoint that is resumed; None if the run starts from the beginning.

    Raises:
        UserError: the file system refuses.
    """
    path = folder / METRICS
    if not path.is_file():
        return
    with writing(path):
        text = path.read_text(encoding="utf-8", errors="replace")
    lines = text.splitlines(keepends=True)
    kept = [line for line in lines if step is not None and line.endswith("\n") and _step_of(line) <= step]
    if kept != lines:
        write_text(path, "".join(kept))


def _step_of(line: str) -> float:
    """The step of an entry; infinite for a damaged one."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
    return step if isinstance(step, int) else float("inf")
