"""`evotok-eval report`: results of one or several models as a table and a plot, beside published figures."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from eval_tasks.reporting.card import ReportCard, make_card
from eval_tasks.reporting.plot import plot_card
from eval_tasks.reporting.published import card_rows, published
from eval_tasks.reporting.runs import Run, read_run
from evotok_plugin.common.files import check_output_folder


def add(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("report", help="results as one table and a plot, beside published figures")
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="output folder of scripts/evaluate.sh or lmms-eval, one a model, or a results file; NAME=FOLDER names it",
    )
    parser.add_argument("-o", "--output", type=Path, help="folder for report.md, report.json and report.png")
    parser.add_argument(
        "--compare", nargs="*", metavar="MODEL", help="published models to show (default: all; none: --compare alone)"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print the table; write it, and the plot, where a folder is named."""
    if arguments.output:
        check_output_folder(arguments.output)
    show([_open(given) for given in arguments.runs], arguments.output, arguments.compare)


def show(runs: Sequence[Run], output: Path | None = None, compare: Sequence[str] | None = None) -> None:
    """What the command does, for runs that are read.

    Raises:
        UserError: an unknown published model, or matplotlib is not installed.
    """
    card = make_card(runs, card_rows(), published(compare))
    print(card.as_markdown())
    if output:
        write_card(card, output)
        print(f"report: {output / 'report.md'}, report.json, report.png")


def _open(given: str) -> Run:
    """A run by its folder, or by `NAME=FOLDER`."""
    name, _, folder = given.rpartition("=")
    return read_run(folder, name) if name and not Path(given).exists() else read_run(given)


def write_card(card: ReportCard, folder: Path) -> None:
    """Write `report.md`, `report.json` and `report.png`; the table is there even where no plot can be drawn.

    Raises:
        UserError: matplotlib is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text(card.as_markdown())
    (folder / "report.json").write_text(card.as_json())
    plot_card(card).savefig(folder / "report.png")
