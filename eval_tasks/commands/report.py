"""`evotok-eval report`: results of one or several models as a table and a plot, next to published figures."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from eval_tasks.reporting.card import ReportCard, make_card
from eval_tasks.reporting.plot import plot_card
from eval_tasks.reporting.published import card_rows, published
from eval_tasks.reporting.runs import Run, read_run
from evotok_plugin.common.command_parser import examples_of
from evotok_plugin.common.files import check_output_folder, write_text, writing


def add(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "report",
        epilog=examples_of(
            "evotok-eval report outputs/evaluation/outputs__finetune",
            "evotok-eval report before=outputs/evaluation/a after=outputs/evaluation/b -o outputs/report --compare",
        ),
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="a model's output folder of scripts/evaluate.sh or lmms-eval, or a results file; NAME=FOLDER names it",
    )
    parser.add_argument(
        "-o", "--output", type=Path, help="folder for report.md, report.json and report.png (default: only print)"
    )
    parser.add_argument(
        "--compare", nargs="*", metavar="MODEL", help="published models to show (default: all; without names: none)"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print the table; with an output folder, also write the table and the plot."""
    if arguments.output:
        check_output_folder(arguments.output)
    show([_open(given) for given in arguments.runs], arguments.output, arguments.compare)


def show(runs: Sequence[Run], output: Path | None = None, compare: Sequence[str] | None = None) -> None:
    """Print the report card of runs; with an output folder, also write it.

    Raises:
        UserError: an unknown published model, or matplotlib is not installed.
    """
    card = make_card(runs, card_rows(), published(compare))
    print(card.as_markdown())
    if output:
        write_card(card, output)
        print(f"report: {output / 'report.md'}, report.json, report.png")


def _open(given: str) -> Run:
    """Read a run given as `FOLDER` or `NAME=FOLDER`."""
    name, _, folder = given.rpartition("=")
    return read_run(folder, name) if name and not Path(given).exists() else read_run(given)


def write_card(card: ReportCard, folder: Path) -> None:
    """Write `report.md`, `report.json` and `report.png`; the tables are written even if no plot can be drawn.

    Raises:
        UserError: a file cannot be written, or matplotlib is not installed.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "report.md", card.as_markdown())
    write_text(folder / "report.json", card.as_json())
    plot = plot_card(card)
    with writing(folder / "report.png"):
        plot.savefig(folder / "report.png")
