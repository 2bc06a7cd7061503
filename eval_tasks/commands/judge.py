"""`evotok-eval judge`: judge drawn images again, or for the first time, without the model that drew them."""

import argparse
import re
from pathlib import Path

from eval_tasks.judging.drawn_run import (
    DrawnRun,
    answers_of,
    drawn_run_folders,
    new_folder,
    open_drawn_run,
    samples_file,
    store_drawn_run,
)
from eval_tasks.judging.judge_run import as_table, judge_run
from eval_tasks.judging.options import JudgeOptions
from eval_tasks.tasks.benchmarks import BENCHMARKS
from evotok_plugin.common.files import check_output_folder
from evotok_plugin.errors import UserError

SAMPLES_NAME = re.compile(r"_samples_(?P<task>\w+)\.jsonl$")


def add(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "judge",
        help="judge images that were drawn before",
        description="Options that are not given come from EVOTOK_JUDGE_<OPTION>, then from the benchmark.",
    )
    parser.add_argument(
        "folder", type=Path, help="a folder of kept images, an lmms-eval output folder, or its *_samples_<task>.jsonl"
    )
    parser.add_argument("--task", choices=sorted(BENCHMARKS), help="where the folder holds images of several")
    parser.add_argument("-o", "--output", type=Path, help="folder of the report (default: beside the images)")
    parser.add_argument("--detector", help="geneval: Mask2Former with COCO's classes, folder or hub id; or scenes")
    parser.add_argument("--clip", help="geneval: CLIP in open_clip's format, folder or hub id")
    parser.add_argument("--vqa", help="genai_bench, dpg_bench: a VQA model of transformers, folder or hub id")
    parser.add_argument("--device", help="cpu, cuda:0, ... (default: CUDA where there is one)")
    parser.add_argument("--batch_size", type=int, help="images, crops or questions a batch")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Judge, print the table, say where the report is."""
    given = {
        name: value for name in JudgeOptions.__dataclass_fields__ if (value := getattr(arguments, name)) is not None
    }
    options = JudgeOptions(**{**JudgeOptions.from_environment().as_dict(), **given})
    if arguments.output:
        check_output_folder(arguments.output)
    kept = find_run(arguments.folder, arguments.task)
    outcome = judge_run(kept, BENCHMARKS[kept.task], options, arguments.output)
    print(as_table(outcome.scores))
    print(f"report: {(arguments.output or kept.folder) / 'contact_sheet.html'}")


def find_run(folder: Path, task: str | None) -> DrawnRun:
    """The newest images below a folder: kept ones, else those of lmms-eval's samples, which are kept now.

    Raises:
        UserError: there are none, or of several tasks.
    """
    if samples := SAMPLES_NAME.search(folder.name):
        return _store_samples(folder, samples["task"])
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder")
    wanted = [task] if task else list(BENCHMARKS)
    kept = {name: path for name in wanted if (path := next(reversed(drawn_run_folders(folder, name)), None))}
    samples = {name: path for name in wanted if name not in kept and (path := samples_file(folder, name))}
    found = sorted([*kept, *samples])
    if not found:
        raise UserError(f"{folder} holds neither kept images nor lmms-eval samples of {' or '.join(wanted)}")
    if len(found) > 1:
        raise UserError(f"{folder} holds images of {', '.join(found)}: choose one with --task")
    (name,) = found
    return open_drawn_run(kept[name]) if name in kept else _store_samples(samples[name], name)


def _store_samples(samples: Path, task: str) -> DrawnRun:
    if task not in BENCHMARKS:
        raise UserError(f"{samples} is of the task {task!r}; known are {', '.join(BENCHMARKS)}")
    return store_drawn_run(new_folder(samples.parent / "drawn", task), task, answers_of(samples))
