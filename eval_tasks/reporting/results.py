"""The one reader of lmms-eval results files: which files hold results, and each task's metrics.

lmms-eval exits with 0 even when a run fails, so the results files decide whether it succeeded.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from evotok_plugin.common.foreign_files import read_json, reading
from evotok_plugin.errors import UserError

# `20260731_120000_results.json` in the supported version; results.json or 0731_1200_NAME_results.json in older ones.
_RESULTS_NAMES = re.compile(r"(\d{8}_\d{6}_|\d{4}_\d{4}_(.+_)?)?results\.json")
_OTHER_KEYS = {"config", "configs", "versions", "n-samples", "group_subtasks", "model_configs", "model_name"}
_LARGEST_FIGURE = 1e15  # beyond every metric; a plot cannot show such numbers
_NOT_METRICS = ("alias", "name", "samples", "sample_len", "sample_count")


@dataclass(frozen=True)
class TaskResult:
    """The results of one task.

    Attributes:
        model: the evaluated model, as lmms-eval names it.
        figures: values by metric; keys are `metric`, or `metric,filter` where a filter has a name. Empty for a task
            without metrics, such as one that writes a submission file.
        documents: number of evaluated documents; None where the file does not record it.
        limited: whether only some of the task's documents were evaluated.
        images_per_prompt: of a drawing task; None for other tasks, and where the file does not record it.
        file: the results file.
    """

    task: str
    model: str
    figures: dict[str, float]
    documents: int | None
    limited: bool
    file: Path
    images_per_prompt: int | None = None


# Files ---------------------------------------------------------------------------------------------------------


def results_files(folder: str | Path, not_before: float = 0.0) -> list[Path]:
    """All results files below a folder, oldest first.

    Names differ between versions of lmms-eval, so a file with another name is recognized by its content.

    Args:
        not_before: seconds since the epoch; older files belong to an earlier run.

    Raises:
        UserError: no results file, which is the sign of a failed lmms-eval run.
    """
    named = [file for file in Path(folder).rglob("*results*.json") if file.is_file()]
    found = [file for file in named if _RESULTS_NAMES.fullmatch(file.name) or _holds_results(file)]
    recent = [file for file in found if file.stat().st_mtime >= not_before]
    if not recent:
        older = f" ({len(found)} from earlier runs)" if found else ""
        raise UserError(
            f"no lmms-eval results in {folder}{older}: nothing was evaluated, or the run failed. lmms-eval exits with "
            "0 even then; its output shows the error above 'Error during evaluation'"
        )
    return sorted(recent, key=lambda file: (file.stat().st_mtime, file.name))


def _holds_results(file: Path) -> bool:
    """Whether a file is an lmms-eval results file; tasks write submissions under similar names."""
    try:
        content = read_json(file)
    except UserError:
        return False
    return isinstance(content.get("results"), dict) and bool(_OTHER_KEYS & set(content))


# Content -------------------------------------------------------------------------------------------------------


def read_results_file(file: Path) -> list[TaskResult]:
    """Read the tasks of a results file of any version; groups, whose members are listed themselves, are skipped.

    Raises:
        UserError: not a results file, or a file without tasks.
    """
    with reading(file, "run lmms-eval again", "read as an lmms-eval results file"):
        content = read_json(file, remedy="run lmms-eval again")
        members_of = content.get("group_subtasks")
        groups = {name for name, members in members_of.items() if members} if isinstance(members_of, dict) else set()
        by_task = {
            task: values if isinstance(values, dict) else {}  # a bad part has no figures
            for task, values in content["results"].items()
            if task not in groups and not (isinstance(values, dict) and values.get(" ") == " ")  # an empty group
        }
        model, config = _model_of(content), content.get("config") or {}
        limited = isinstance(config, dict) and config.get("limit") not in (None, 0, -1)
        results = [
            replace(
                _task_result(task, values, model, _samples_of(content, task), limited, file),
                images_per_prompt=_images_per_prompt(content, task),
            )
            for task, values in by_task.items()
        ]
    if not results:
        raise UserError(f"{file} has no results of any task; run lmms-eval again")
    return results


def _samples_of(content: dict, task: str) -> object:
    samples = content.get("n-samples")
    return samples.get(task) if isinstance(samples, dict) else None


def _images_per_prompt(content: dict, task: str) -> int | None:
    """The number of images that a task requests for each prompt, with `--gen_kwargs`."""
    configs = content.get("configs")
    config = configs.get(task) if isinstance(configs, dict) else None
    options = config.get("generation_kwargs") if isinstance(config, dict) else None
    number = options.get("num_images") if isinstance(options, dict) else None
    return number if type(number) is int else None


def _model_of(content: dict) -> str:
    """The model's name; its key differs between versions."""
    config = content.get("config") or content.get("model_configs")
    config = config if isinstance(config, dict) else {}
    values = (content.get("model_name"), *(config.get(key) for key in ("model_args", "model")))
    return next((value for value in values if isinstance(value, str) and value), "unnamed model")


def _task_result(task: str, values: dict, model: str, samples: object, limited: bool, file: Path) -> TaskResult:
    counts = samples if isinstance(samples, dict) else {"effective": samples, "original": samples}
    effective, original = counts.get("effective"), counts.get("original")
    return TaskResult(
        task=task,
        model=model,
        figures=_figures_of(values),
        documents=effective if type(effective) is int else None,
        limited=limited or effective != original,
        file=file,
    )


def _figures_of(values: dict) -> dict[str, float]:
    """The numbers in a task's row, whose keys are `metric,filter`; the filter `none` is dropped from the name.

    Versions before filters wrote bare metrics.
    """
    figures, has_filters = {}, any("," in key for key in values)
    for key, value in values.items():
        metric, _, selection = key.partition(",")
        if not has_filters and key not in _NOT_METRICS:
            selection = "none"
        if not selection or "_stderr" in metric or isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if abs(value) < _LARGEST_FIGURE:  # a metric of no documents is NaN
            figures[metric if selection == "none" else key] = float(value)
    return figures


# Checks --------------------------------------------------------------------------------------------------------


def require_figures(results: Sequence[TaskResult], tasks: Sequence[str] = ()) -> None:
    """Check that every task was scored, which lmms-eval's exit code does not show.

    Args:
        tasks: tasks that must be among the results.

    Raises:
        UserError: a task without figures.
    """
    by_task = {result.task: result.figures for result in results}
    if empty := [task for task in {**dict.fromkeys(tasks), **by_task} if not by_task.get(task)]:
        raise UserError(
            f"{results[0].file} has no figures for {', '.join(empty)}: nothing was scored, or the task only writes a "
            f"submission file; the file has the tasks {', '.join(sorted(by_task))}"
        )


def read_results(folder: str | Path, tasks: Sequence[str] = (), not_before: float = 0.0) -> dict[str, dict[str, float]]:
    """Read the newest results file below a folder: {task: {metric: value}}.

    Args:
        tasks: tasks that must be among the results.
        not_before: start of the run (`time.time()`), so that the file of an earlier run is not used.

    Raises:
        UserError: no results, an unreadable file, or a task without figures.
    """
    results = read_results_file(results_files(folder, not_before)[-1])
    require_figures(results, tasks)
    return {result.task: result.figures for result in results}
