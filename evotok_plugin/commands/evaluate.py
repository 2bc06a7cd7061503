"""`evotok evaluate`: reconstruction quality, semantic features and code usage of a tokenizer, or of its images."""

import argparse
import re
from dataclasses import replace
from pathlib import Path

from evotok_plugin.commands.options import at_size
from evotok_plugin.common.files import check_output_file, check_output_folder, write_text, writing
from evotok_plugin.common.pictures import save_picture
from evotok_plugin.common.processes import Processes
from evotok_plugin.data.sources import ImageSource, open_sources
from evotok_plugin.errors import UserError
from evotok_plugin.evaluation.evaluate import evaluate
from evotok_plugin.evaluation.held_out import held_out_images
from evotok_plugin.evaluation.options import EvaluationOptions
from evotok_plugin.evaluation.reconstructions import evaluate_reconstructions
from evotok_plugin.evaluation.report import Evaluation
from evotok_plugin.metrics.zero_shot import has_text_tower, load_zero_shot, read_class_names
from evotok_plugin.teacher import load_recorded_teacher
from evotok_plugin.tokenizer_folder import open_tokenizer


def run(arguments: argparse.Namespace) -> None:
    """Evaluate in all processes that torchrun has started, then print and write the tables."""
    _check_output(arguments.output)
    _check_together(arguments)
    processes = Processes.join(arguments.device)
    try:
        evaluation = _evaluate(arguments, processes)
    finally:
        processes.leave()
    if evaluation is not None:
        print(evaluation.as_markdown())
        if arguments.output:
            _write(evaluation, arguments.output)


def _check_together(arguments: argparse.Namespace) -> None:
    """Check that exactly one set of images and one origin of reconstructions is given."""
    if bool(arguments.source) == bool(arguments.held_out):
        given = "both" if arguments.source else "neither"
        raise UserError(f"expected images to evaluate on, or --held_out RUN; got {given}")
    if arguments.reconstructions:
        for name in ("model", "teacher", "size", "class_names"):
            if getattr(arguments, name) is not None:
                raise UserError(
                    f"--{name} has no effect with --reconstructions, which compares images only; leave one of them out"
                )
    if arguments.class_names and not arguments.teacher:
        raise UserError("--class_names has no effect without --teacher, whose text tower reads the names")


def _evaluate(arguments: argparse.Namespace, processes: Processes) -> Evaluation | None:
    if arguments.reconstructions:
        given = open_sources([arguments.reconstructions])
        return evaluate_reconstructions(_source(arguments), given, _options(arguments), processes)
    folder = arguments.model or (str(arguments.held_out) if arguments.held_out else None)
    model, processor = open_tokenizer(folder, str(processes.device))
    options = _options(arguments)
    if arguments.teacher:
        classifier = load_zero_shot(arguments.teacher) if has_text_tower(arguments.teacher) else None
        options = replace(
            options,
            teacher=load_recorded_teacher(arguments.teacher, model.name_or_path).to(processes.device),
            classifier=classifier.to(processes.device) if classifier is not None else None,
            class_names=read_class_names(arguments.class_names) if arguments.class_names else {},
        )
    return evaluate(model, at_size(processor, model, arguments.size), _source(arguments), options, processes)


def _source(arguments: argparse.Namespace) -> ImageSource:
    return held_out_images(arguments.held_out) if arguments.held_out else open_sources(arguments.source)


def _options(arguments: argparse.Namespace) -> EvaluationOptions:
    return EvaluationOptions(
        metrics=arguments.metrics,
        inception_weights=arguments.inception_weights,
        stats_cache=arguments.stats_cache,
        batch_size=arguments.batch_size,
        num_workers=arguments.num_workers,
        max_bad_fraction=arguments.max_bad_fraction,
        report=_folder(arguments.output) / "bad_samples.jsonl" if arguments.output else None,
    )


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
