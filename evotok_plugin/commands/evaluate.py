"""`evotok evaluate`: reconstruction quality, semantic features and code usage of a tokenizer."""

import argparse
import re
from pathlib import Path

from evotok_plugin.commands.options import SharedOptions, at_size
from evotok_plugin.common.command_parser import examples_of
from evotok_plugin.common.files import check_output_file, check_output_folder, write_text, writing
from evotok_plugin.common.pictures import save_picture
from evotok_plugin.common.processes import Processes
from evotok_plugin.data.sources import open_sources
from evotok_plugin.errors import UserError
from evotok_plugin.evaluation.evaluate import METRICS, EvaluationOptions, evaluate
from evotok_plugin.evaluation.report import Evaluation
from evotok_plugin.teacher import load_recorded_teacher
from evotok_plugin.tokenizer_folder import open_tokenizer


def add(commands: argparse._SubParsersAction, shared: SharedOptions) -> None:
    parser = commands.add_parser(
        "evaluate",
        parents=[shared.model, shared.counting, shared.sizing],
        epilog=examples_of(
            "evotok evaluate photos",
            "evotok evaluate imagenet/val --model outputs/evotok --metrics all --teacher siglip2 -o outputs/measured",
        ),
    )
    parser.add_argument("source", nargs="+", help="images, folders, tar shards, parquet or hf:NAME")
    parser.add_argument(
        "-o", "--output", type=Path, help="folder for metrics.json, metrics.md and grid.png; NAME.json: only that file"
    )
    parser.add_argument(
        "--metrics",
        nargs="+",
        metavar="METRIC",
        help=f"all, or some of {', '.join(METRICS)} (default: those without a download)",
    )
    parser.add_argument(
        "--teacher",
        metavar="FOLDER",
        help="teacher to compare semantic features with: a folder, a hub id or timm:NAME[:FILE]",
    )
    parser.add_argument("--inception_weights", metavar="FILE", help="for rfid (default: torch's hub folder)")
    parser.add_argument(
        "--stats_cache", type=Path, metavar="FOLDER", help="for rfid: cache of statistics of the originals"
    )
    parser.add_argument("--batch_size", type=int, default=EvaluationOptions.batch_size, help="images per batch")
    parser.add_argument(
        "--num_workers", type=int, default=EvaluationOptions.num_workers, help="processes that decode images"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Evaluate in all processes that torchrun has started, then print and write the tables."""
    _check_output(arguments.output)
    processes = Processes.join(arguments.device)
    try:
        evaluation = _evaluate(arguments, processes)
    finally:
        processes.leave()
    if evaluation is not None:
        print(evaluation.as_markdown())
        if arguments.output:
            _write(evaluation, arguments.output)


def _evaluate(arguments: argparse.Namespace, processes: Processes) -> Evaluation | None:
    model, processor = open_tokenizer(arguments.model, str(processes.device))
    teacher = (
        load_recorded_teacher(arguments.teacher, model.name_or_path).to(processes.device) if arguments.teacher else None
    )
    options = EvaluationOptions(
        metrics=arguments.metrics,
        teacher=teacher,
        inception_weights=arguments.inception_weights,
        stats_cache=arguments.stats_cache,
        batch_size=arguments.batch_size,
        num_workers=arguments.num_workers,
        max_bad_fraction=arguments.max_bad_fraction,
        report=_folder(arguments.output) / "bad_samples.jsonl" if arguments.output else None,
    )
    processor = at_size(processor, model, arguments.size)
    return evaluate(model, processor, open_sources(arguments.source), options, processes)


def _is_json(output: Path) -> bool:
    return output.suffix.lower() == ".json"


def _folder(output: Path) -> Path:
    return output.parent if _is_json(output) else output


def _check_output(output: Path | None) -> None:
    """Check before any work that the output can be written."""
    if output is None:
        return
    if _is_json(output):
        check_output_file(output, [".json"])
    elif output.suffix and not output.is_dir() and re.fullmatch(r"\.[a-zA-Z]\w{0,4}", output.suffix):
        raise UserError(f"-o {output}: expected a folder or NAME.json, got the suffix {output.suffix!r}")
    else:
        check_output_folder(output)


def _write(evaluation: Evaluation, output: Path) -> None:
    with writing(output):
        _folder(output).mkdir(parents=True, exist_ok=True)
    if _is_json(output):
        write_text(output, evaluation.as_json())
    else:
        write_text(output / "metrics.json", evaluation.as_json())
        write_text(output / "metrics.md", evaluation.as_markdown())
        if evaluation.pictures:
            save_picture(evaluation.grid(), output / "grid.png")
    print(output)
