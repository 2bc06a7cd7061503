"""`evotok-eval judge`: judge drawn images, again or for the first time, without the model that drew them."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from evotok_plugin.common.command_parser import examples_of
from evotok_plugin.common.files import check_output_folder
from evotok_plugin.errors import UserError

if TYPE_CHECKING:
    from eval_tasks.judging.drawn_run import DrawnRun

TASKS = ("dpg_bench", "genai_bench", "geneval", "geneval_scenes")
DEFAULT_IMAGES = Path("outputs/lmms_eval_images")  # of models of this project in lmms-eval
_DEFAULT = " (default: EVOTOK_JUDGE_<OPTION>, then the benchmark's)"
SAMPLES_NAME = re.compile(r"_samples_(?P<task>\w+)\.jsonl$")


def add(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "judge",
        epilog=examples_of(
            "evotok-eval judge outputs/evaluation/outputs__finetune --task geneval_scenes",
            "evotok-eval judge results --task geneval --detector mask2former --clip clip -o judged",
        ),
    )
    parser.add_argument(
        "folder", type=Path, help="a folder of drawn images, an lmms-eval output folder, or its *_samples_<task>.jsonl"
    )
    parser.add_argument(
        "--task", choices=TASKS, help="required if the folder holds images of several tasks (default: the only one)"
    )
    parser.add_argument(
        "--images",
        type=Path,
        help="folder of the images that a samples file names (default: the given folder, and outputs/lmms_eval_images)",
    )
    parser.add_argument("-o", "--output", type=Path, help="folder for the report (default: that of the images)")
    parser.add_argument(
        "--detector", help="geneval: Mask2Former with COCO's classes, folder or hub id; or scenes" + _DEFAULT
    )
    parser.add_argument("--clip", help="geneval: CLIP in open_clip's format, folder or hub id" + _DEFAULT)
    parser.add_argument(
        "--vqa", help="genai_bench, dpg_bench: a VQA model of transformers, folder or hub id" + _DEFAULT
    )
    parser.add_argument("--device", help="cpu, cuda:0, ... (default: CUDA if available)")
    parser.add_argument("--batch_size", type=int, help="images, crops or questions per batch" + _DEFAULT)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Judge a run, print its scores, and print where the report is."""
    from eval_tasks.judging.judge_run import as_table, judge_run
    from eval_tasks.judging.options import JudgeOptions
    from eval_tasks.tasks.benchmarks import BENCHMARKS

    given = {
        name: value for name in JudgeOptions.__dataclass_fields__ if (value := getattr(arguments, name)) is not None
    }
    options = JudgeOptions(**{**JudgeOptions.from_environment().as_dict(), **given})
    if arguments.output:
        check_output_folder(arguments.output)
    drawn_run = find_run(arguments.folder, arguments.task, arguments.images)
    outcome = judge_run(drawn_run, BENCHMARKS[drawn_run.task], options, arguments.output)
    print(as_table(outcome.scores))
    print(f"report: {(arguments.output or drawn_run.folder) / 'contact_sheet.html'}")


def find_run(folder: Path, task: str | None, images: Path | None = None) -> "DrawnRun":
    """Open the newest drawn run below a folder, or create one from the newest samples of lmms-eval.

    Args:
        folder: a folder, or a samples file.
        images: folder of the images that a samples file names; by default `folder` and the default folder of drawings.

    Raises:
        UserError: no images, or images of several tasks.
    """
    from eval_tasks.judging.drawn_run import drawn_run_folders, open_drawn_run, samples_file

    roots = [images] if images is not None else [folder if folder.is_dir() else folder.parent, DEFAULT_IMAGES]
    if match := SAMPLES_NAME.search(folder.name):
        return _store_samples(folder, match["task"], roots)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    wanted = [task] if task else TASKS
    runs = {name: path for name in wanted if (path := next(reversed(drawn_run_folders(folder, name)), None))}
    samples = {name: path for name in wanted if name not in runs and (path := samples_file(folder, name))}
    found = sorted([*runs, *samples])
    if not found:
        raise UserError(f"{folder} holds neither drawn images nor lmms-eval samples of {' or '.join(wanted)}")
    if len(found) > 1:
        raise UserError(f"{folder} holds images of {', '.join(found)}: choose one with --task")
    (name,) = found
    return open_drawn_run(runs[name]) if name in runs else _store_samples(samples[name], name, roots)


def _store_samples(samples: Path, task: str, roots: Sequence[Path]) -> "DrawnRun":
    from eval_tasks.judging.drawn_run import answers_of, new_folder, store_drawn_run

    if task not in TASKS:
        raise UserError(f"{samples} belongs to the task {task!r}; expected one of {', '.join(TASKS)}")
    return store_drawn_run(new_folder(samples.parent / "drawn", task), task, answers_of(samples), roots)
