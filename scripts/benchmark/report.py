"""The result of a benchmark: a JSON file with its figures, its tables and the machine.

`collect.py` writes the tables into the documentation. Shared by the benchmarks in this folder.
"""

import argparse
import importlib.metadata
import json
import platform
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measuring import device_name

_ABSOLUTE = re.compile(r"(?<![^:=])/(?!/).*")  # also as in NAME:/PATH and --flag=/PATH


@dataclass(frozen=True)
class Table:
    """A table of texts. The first cell of a row names it."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """The table in Markdown; the first column is aligned to the left, all others to the right."""
        rule = ["---", *["---:"] * (len(self.header) - 1)]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in (self.header, rule, *self.rows))


def three_digits(value: float) -> str:
    """A number with three significant digits, and all digits before the point."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Add --json."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the figures and tables, for collect.py")


def machine(device: str | torch.device = "cpu", packages: Sequence[str] = ("torch",), **more: str) -> dict[str, str]:
    """The hardware and software of a measurement; packages that are not installed are left out."""
    found = {"device": device_name(torch.device(device)), "threads": str(torch.get_num_threads()), **more}
    found["python"] = platform.python_version()
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def command_line(script: str | Path) -> str:
    """The command that runs this program, without --json; of absolute paths only the last part is kept."""
    words, given = ["python", "/".join(Path(script).resolve().parts[-3:])], iter(sys.argv[1:])
    for word in given:
        if word == "--json":
            next(given, None)
        elif not word.startswith("--json="):
            words.append(without_absolute_paths(word))
    return shlex.join(words)


def without_absolute_paths(content: Any) -> Any:
    """The last part of every text that is an absolute path, in mappings and lists; other content stays as it is."""
    if isinstance(content, Mapping):
        return {key: without_absolute_paths(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [without_absolute_paths(one) for one in content]
    return _ABSOLUTE.sub(lambda path: Path(path[0]).name, content) if isinstance(content, str) else content


def write_report(
    path: Path | None,
    script: str | Path,
    tables: Mapping[str, Table],
    on: Mapping[str, str],
    figures: Mapping[str, Any] | None = None,
) -> None:
    """Write a result unless `path` is None.

    Args:
        script: file of the benchmark, in a folder in `scripts`.
        tables: by the name that stands in the documentation's markers.
        on: see `machine`.
        figures: further content; of absolute paths in it only the last part is kept.
    """
    if path is None:
        return
    shown = {
        name: {"header": list(one.header), "rows": [list(row) for row in one.rows]} for name, one in tables.items()
    }
    content = {
        "command": command_line(script),
        "machine": dict(on),
        **without_absolute_paths(figures or {}),
        "tables": shown,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
