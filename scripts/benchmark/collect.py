"""Write the tables of benchmarks into the documentation, from the JSON files of their `--json`.

    python scripts/benchmark/collect.py                     # print all tables
    python scripts/benchmark/collect.py --write             # replace the tables in README.md and docs/
    python scripts/benchmark/collect.py --check             # exit with 1 if a table in the documentation differs

A table stands between `<!-- benchmark NAME -->` and `<!-- end -->`, with a line that names the machine and the command;
`<!-- benchmark NAME NAME -->` holds several tables, with one such line if they come from the same runs. A figure in a
sentence, `<!-- figure NAME | ROW | COLUMN -->0.918<!-- end -->`, is the cell of a table; ROW is its first cell or the
beginning of it. Its marker does not begin a line, since Markdown would take the line for HTML.
Several files with the same table (other numbers of threads or rounds) give ranges: "1.2 to 1.4". Results of another
machine have a folder of their own in `results`, and their tables its name: `<!-- benchmark text@FOLDER -->`.
"""

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from report import Table

from evotok_plugin.common import command_line
from evotok_plugin.common.command_parser import CommandParser
from evotok_plugin.common.files import write_text
from evotok_plugin.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results"
BLOCK = re.compile(r"(<!-- benchmark (\S+(?: \S+)*) -->\n).*?(<!-- end -->)", re.S)
FIGURE = re.compile(r"(<!-- figure ([^|\n]+?) \| ([^|\n]+?) \| ([^|\n]+?) -->).*?(<!-- end -->)", re.S)
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_CLOCKS = {"cpu": "CPU time", "wall": "wall time"}


@dataclass
class Collected:
    """All results of one table."""

    tables: list[Table] = field(default_factory=list)
    machines: list[dict[str, str]] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)

    def merged(self, name: str) -> Table:
        """One table: rows in the order of their first occurrence, ranges where cells differ.

        Raises:
            UserError: the tables have different columns, or cells differ in more than their numbers.
        """
        headers = {tuple(table.header) for table in self.tables}
        if len(headers) > 1:
            raise UserError(
                f"the results of {name!r} have different columns: {sorted(headers)}; collect them separately"
            )
        rows: dict[tuple[str, int], list[Sequence[str]]] = {}
        for table in self.tables:
            seen: Counter[str] = Counter()  # rows of one table may begin with the same cell
            for row in table.rows:
                rows.setdefault((row[0], seen[row[0]]), []).append(row)
                seen[row[0]] += 1
        merged = [[ranges(name, cells) for cells in zip(*found, strict=True)] for found in rows.values()]
        return Table(self.tables[0].header, merged)

    def caption(self) -> str:
        """The machines and commands, in one line."""
        values = {key: unique(one[key] for one in self.machines if key in one) for one in self.machines for key in one}
        devices = " and ".join(values.pop("device"))
        threads = values.pop("threads", [])
        plural = "s" if threads != ["1"] else ""
        parts = [devices, f"{' or '.join(threads)} thread{plural}"] if threads else [devices]
        parts += [" and ".join(_CLOCKS[clock] for clock in values.pop("clock", [])) or ""]
        parts += [f"{key} {' and '.join(found)}" for key, found in values.items()]
        runs = f" ({len(self.tables)} results)" if len(self.tables) > 1 else ""
        commands = ", ".join(f"`{command}`" for command in unique(self.commands))
        return f"{', '.join(filter(None, parts))}{runs}: {commands}"


def block(names: Sequence[str], found: dict[str, Collected]) -> str:
    """Tables and their captions in Markdown; tables of the same runs share a caption."""
    parts: list[str] = []
    for place, name in enumerate(names):
        caption, following = found[name].caption(), [found[other].caption() for other in names[place + 1 : place + 2]]
        parts += [found[name].merged(name).markdown(), *([] if following == [caption] else [caption])]
    return "\n\n".join(parts) + "\n"


def cell(table: Table, row: str, column: str) -> str:
    """The cell in the row that begins with `row`.

    Raises:
        UserError: the table does not have exactly one such row and one such column.
    """
    rows = [one for one in table.rows if one[0] == row] or [one for one in table.rows if one[0].startswith(row)]
    if len(rows) != 1 or list(table.header).count(column) != 1:
        found = [one[0] for one in table.rows]
        raise UserError(f"expected one row {row!r} of {found} and one column {column!r} of {list(table.header)}")
    return rows[0][list(table.header).index(column)]


def unique(values: Iterable[str]) -> list[str]:
    """The different values in the order of their first occurrence."""
    return list(dict.fromkeys(values))


def ranges(name: str, cells: Sequence[str]) -> str:
    """One cell for all: where the numbers differ, the least and the largest.

    Raises:
        UserError: the texts around the numbers differ.
    """
    if len(set(cells)) == 1:
        return cells[0]
    texts = {tuple(_NUMBER.split(cell)) for cell in cells}
    if len(texts) > 1:
        raise UserError(f"the results of {name!r} cannot be merged: {sorted(set(cells))}; collect them separately")
    words, numbers = list(texts.pop()), [_NUMBER.findall(cell) for cell in cells]
    merged = words[0]
    for place, word in enumerate(words[1:]):
        found = sorted({row[place] for row in numbers}, key=float)
        merged += (found[0] if len(found) == 1 else f"{found[0]} to {found[-1]}") + word
    return merged


def collect(files: Sequence[Path]) -> dict[str, Collected]:
    """Read results, by the names of their tables.

    Raises:
        UserError: a file is not a result of a benchmark.
    """
    found: dict[str, Collected] = {}
    for file in files:
        try:
            result = json.loads(file.read_text(encoding="utf-8"))
            tables = {name: Table(one["header"], one["rows"]) for name, one in result["tables"].items()}
            machine, command = result["machine"], result["command"]
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(f"{file} is not a result of a benchmark ({error!r}); write it with --json") from error
        folder = f"@{file.parent.name}" if file.resolve().parent.parent == RESULTS.resolve() else ""
        for name, table in tables.items():
            one = found.setdefault(name + folder, Collected())
            one.tables.append(table)
            one.machines.append(machine)
            one.commands.append(command)
    return found


def with_tables(text: str, found: dict[str, Collected]) -> str:
    """A page of documentation with the tables and figures that were found; others stay as they are.

    Raises:
        UserError: a figure begins a line, or names a cell that does not exist.
    """
    if wrong := re.search(r"^ *<!-- figure .*", text, re.M):
        raise UserError(f"expected a word before {wrong[0][:60]!r} in its line; Markdown takes the line for HTML")

    def replace(match: re.Match[str]) -> str:
        names = match[2].split()
        return f"{match[1]}{block(names, found)}{match[3]}" if found.keys() >= set(names) else match[0]

    def replace_figure(match: re.Match[str]) -> str:
        start, name, row, column, end = match.groups()
        return f"{start}{cell(found[name].merged(name), row, column)}{end}" if name in found else match[0]

    return FIGURE.sub(replace_figure, BLOCK.sub(replace, text))


def run(options: argparse.Namespace) -> int:
    """Print, write or check the tables.

    Raises:
        UserError: a result is damaged, or a table has no place in the documentation.
    """
    files = options.files or sorted(RESULTS.rglob("*.json"))
    found = collect(files)
    if not (options.write or options.check):
        print("\n\n".join(f"{name}\n\n{block([name], found)}" for name in found), end="")
        return 0
    pages = [options.repository / "README.md", *sorted((options.repository / "docs").glob("*.md"))]
    texts = {page: page.read_text(encoding="utf-8") for page in pages}
    placed = {name for text in texts.values() for _, names, _ in BLOCK.findall(text) for name in names.split()}
    if missing := sorted(set(found) - placed):
        raise UserError(f"no page has the markers <!-- benchmark NAME --> and <!-- end --> for {', '.join(missing)}")
    if unknown := sorted(placed - set(found)):
        print(f"without a stored result: {', '.join(unknown)}")
    changed = {page: new for page, text in texts.items() if (new := with_tables(text, found)) != text}
    for page, text in changed.items():
        print(f"{'updated' if options.write else 'differs:'} {page.relative_to(options.repository)}")
        if options.write:
            write_text(page, text)
    return int(options.check and bool(changed))


def main() -> int:
    """Parse the flags and collect."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, help="results (default: all in scripts/benchmark/results)")
    parser.add_argument("--write", action="store_true", help="replace the tables in the documentation")
    parser.add_argument("--check", action="store_true", help="exit with 1 if the documentation differs")
    parser.add_argument("--repository", type=Path, default=REPOSITORY, help="folder with README.md and docs/")
    return command_line.run(parser, work=run)


if __name__ == "__main__":
    sys.exit(main())
