"""Run the benchmarks of generation, and write their tables into docs/performance.md.

    python scripts/benchmark/tables.py outputs/benchmarks --threads 1
    python scripts/benchmark/tables.py outputs/benchmarks --only text     # the others keep their results

Every benchmark writes FOLDER/NAME.json; those that have one are not run again (`--rerun` does). A table replaces what
is between its marker and the end marker in the page. A benchmark whose codes or tokens differ from the baseline's ends
the run with an error.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evotok_plugin.common import command_line
from evotok_plugin.common.command_parser import CommandParser
from evotok_plugin.common.files import write_text
from evotok_plugin.errors import UserError

HERE = Path(__file__).resolve().parent
PAGE = HERE.parents[1] / "docs" / "performance.md"
END = "<!-- end of the table -->"
Rows = list[list[str]]


def drawing_table(found: dict[str, Any]) -> Rows:
    """Columns are batch sizes."""
    results = found["results"]
    pairs = [(result["contestants"]["ours"], result["contestants"]["straightforward"]) for result in results]
    faster = [result["times_faster"] for result in results]
    each = list(zip(pairs, faster, strict=True))

    def of_ours(name: str, form: str, factor: float = 1) -> list[str]:
        return [form.format(factor * own[name]) for own, _ in pairs]

    return [
        ["", *(f"batch {result['batch']}" for result in results)],
        ["position, straightforward", *(f"{other['milliseconds_a_position']:.0f} ms" for _, other in pairs)],
        ["position, ours", *of_ours("milliseconds_a_position", "{:.0f} ms")],
        [
            "of this, image head",
            *(f"{own['of_them_image_head']:.0f} ms ({ratio['head']:.1f} times faster)" for (own, _), ratio in each),
        ],
        ["image head with PyTorch's layers", *of_ours("of_them_image_head_by_plain_layers", "{:.0f} ms")],
        ["of this, sampling", *of_ours("of_them_sampling", "{:.1f} ms")],
        [
            "images per second, ours (straightforward)",
            *(f"{own['images_per_second']:.4f} ({other['images_per_second']:.4f})" for own, other in pairs),
        ],
        ["**a whole image, times faster**", *(f"**{ratio['image']:.1f}**" for ratio in faster)],
        [
            "first preview, after 16 positions",
            *(f"{own['seconds_to_first_preview']:.1f} s ({other['seconds_to_first_preview']:.1f})"
              for own, other in pairs),
        ],
        ["memory: keys, values, activations", *of_ours("peak_mebibytes", "{:.0f} MiB")],
        ["memory: packed weights", *of_ours("packed_mebibytes", "{:.0f} MiB")],
        ["time outside matrix products", *of_ours("share_outside_matrix_products", "{:.1f} %", 100)],
    ]  # fmt: skip


def text_table(found: dict[str, Any]) -> Rows:
    """A row per model and batch size."""
    rows = [["model", "batch", "transformers", "ours", "times faster", "a step of ours"]]
    for result in found["results"]:
        rates = result["tokens_per_second"]
        rows.append([
            result["model"], str(result["batch"]), f"{rates['transformers']:.1f} tokens/s",
            f"{rates['ours']:.1f} tokens/s", f"**{result['times_faster']:.2f}**",
            f"{result['milliseconds_a_step']['ours']:.1f} ms",
        ])  # fmt: skip
    return rows


def guidance_table(found: dict[str, Any]) -> Rows:
    """A row per model and batch size, the settings of guidance as columns."""
    rows = [["model", "batch", "all positions", "first half", "last half", "no guidance"]]
    for result in found["results"]:
        share = result["share_of_all"]
        columns = [f"{share[name]:.2f}" for name in ("first half", "last half", "none")]
        rows.append([result["model"], str(result["batch"]), f"{result['milliseconds']['all']:.0f} ms", *columns])
    return rows


def linear_table(found: dict[str, Any]) -> Rows:
    """A row per shape, numbers of rows as columns."""
    numbers = [one["rows"] for one in found["results"][0]["results"]]
    rows = [["inputs x outputs", *(f"{number} rows" if number > 1 else "1 row" for number in numbers)]]
    for result in found["results"]:
        pairs = [one["microseconds"] for one in result["results"]]
        row = [f"{pair['PyTorch']:.0f} / {pair['ours']:.0f} us" for pair in pairs]
        rows.append([result["shape"] + ("" if result["is_thin"] else ", below the limit"), *row])
    return rows


# By name: the script, its table, and the flags of the smallest run.
BENCHMARKS: dict[str, tuple[str, Callable[[dict[str, Any]], Rows], list[str]]] = {
    "drawing": (
        "generation.py",
        drawing_table,
        ["--head", "tiny", "--backbone", "tiny", "--batch", "1", "--positions", "2", "--rounds", "1"],
    ),
    "text": ("text.py", text_table, ["--models", "included", "--batch", "1", "--tokens", "20", "--rounds", "1"]),
    "guidance_cost": (
        "guidance_cost.py",
        guidance_table,
        ["--models", "tiny", "included", "--batch", "1", "--rounds", "1"],
    ),
    "linear_layers": (
        "linear_layers.py",
        linear_table,
        ["--shapes", "256x512", "256x1024", "--rows", "1", "4", "--rounds", "1"],
    ),
}


def as_markdown(rows: Rows) -> str:
    """A table whose first row is the header."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def machine_line(machine: dict[str, Any]) -> str:
    """Describe the machine and the software of a table in one line."""
    threads = "one thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    clock = "CPU time" if machine["clock"] == "cpu" else "wall-clock time"
    versions = f"torch {machine['torch']}, transformers {machine['transformers']}"
    return f"{machine['device']}, {threads}, {clock}, {versions}:"


def with_table(page: str, name: str, block: str) -> str:
    """Replace the table of a benchmark in a page.

    Raises:
        UserError: the page has no marker for it.
    """
    before, marker, rest = page.partition(f"<!-- table: {name} -->\n")
    _, end, after = rest.partition(END)
    if not marker or not end:
        raise UserError(f"the page has no '<!-- table: {name} -->' ... '{END}'; add both lines where the table belongs")
    return f"{before}{marker}{block}\n{end}{after}"


def run(arguments: argparse.Namespace) -> None:
    """Run what has no results yet, and write the tables of all that have."""
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name in arguments.only:
        script, _, smallest = BENCHMARKS[name]
        output = arguments.folder / f"{name}.json"
        if output.exists() and not arguments.rerun:
            continue
        flags = ["--threads", str(arguments.threads), *(smallest if arguments.smallest else [])]
        command = [sys.executable, str(HERE / script), *flags, "--json", str(output)]
        print(" ".join(command), flush=True)
        if subprocess.run(command, check=False).returncode:
            raise UserError(f"{script} failed, or its codes or tokens differ from the baseline's; see its output above")
    page = arguments.page.read_text(encoding="utf-8")
    for name, (_, table, _) in BENCHMARKS.items():
        output = arguments.folder / f"{name}.json"
        if output.exists():
            found = json.loads(output.read_text(encoding="utf-8"))
            page = with_table(page, name, f"{machine_line(found['machine'])}\n\n{as_markdown(table(found))}")
    write_text(arguments.page, page)
    print(arguments.page)


def main() -> int:
    """Parse the flags and run the benchmarks."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of the results, one JSON file per benchmark")
    names = list(BENCHMARKS)
    parser.add_argument("--only", nargs="+", default=names, choices=names, help="benchmarks to run")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--rerun", action="store_true", help="replace results")
    parser.add_argument("--smallest", action="store_true", help="run the smallest size, as the tests do")
    parser.add_argument("--page", type=Path, default=PAGE, help="page whose tables are written")
    return command_line.run(parser, work=run)


if __name__ == "__main__":
    sys.exit(main())
