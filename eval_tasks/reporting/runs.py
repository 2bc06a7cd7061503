"""What lmms-eval has left in a folder: figures by task, and what makes them comparable or not."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eval_tasks.reporting.results import figures_of
from evotok_plugin.errors import UserError

# `20260731_120000_results.json` today; results.json or 0731_1200_NAME_results.json in older versions.
_RESULTS_NAMES = re.compile(r"(\d{8}_\d{6}_|\d{4}_\d{4}_(.+_)?)?results\.json")
_BESIDE = {"config", "configs", "versions", "n-samples", "group_subtasks", "model_configs", "model_name"}


@dataclass(frozen=True)
class TaskResult:
    """One task's figures.

    Attributes:
        model: what was evaluated, as lmms-eval names it.
        figures: by metric; keys are `metric`, or `metric,filter` where a filter has a name. Empty where the task left
            none, such as one that writes a submission file.
        documents: how many were asked; None where the file does not say.
        limited: whether that is fewer than the task has.
        file: where this stands.
    """

    task: str
    model: str
    figures: dict[str, float]
    documents: int | None
    limited: bool
    file: Path


@dataclass(frozen=True)
class Run:
    """The results of one model, by task: the newest of each; `unreadable` says which files could not be read."""

    name: str
    model: str
    tasks: dict[str, TaskResult]
    unreadable: tuple[str, ...] = ()


def read_run(path: str | Path, name: str | None = None, not_before: float = 0.0) -> Run:
    """All tasks of all results files below a folder, or of one file; of a task's several the newest.

    Args:
        name: of the run, by default the folder's or the file's.
        not_before: seconds since the epoch; older files belong to an earlier run.

    Raises:
        UserError: nothing there, no file that can be read, or results of several models.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist; expected the output folder of lmms-eval or scripts/evaluate.sh")
    files = [path] if path.is_file() else _results_files(path, not_before)
    return make_run(name or (path.stem if path.is_file() else path.resolve().name), files)


def make_run(name: str, files: Sequence[Path]) -> Run:
    """The tasks of results files, later ones over earlier ones; files that cannot be read are named by the run.

    Raises:
        UserError: no file that can be read, or results of several models.
    """
    tasks: dict[str, TaskResult] = {}
    unreadable: dict[Path, str] = {}
    for file in files:
        try:
            tasks |= {result.task: result for result in read_results_file(file)}
        except ValueError as error:
            unreadable[file] = str(error)
    if not tasks:
        raise UserError(next(iter(unreadable.values()), f"{name} has no results of any task"))
    by_model = {result.model: result for result in tasks.values()}
    if len(by_model) > 1:
        places = "; ".join(f"{model} in {result.file.parent}" for model, result in by_model.items())
        raise UserError(f"{name} would have results of several models ({places}); give their folders one by one")
    return Run(name, next(iter(by_model)), tasks, tuple(unreadable.values()))


def _results_files(folder: Path, not_before: float) -> list[Path]:
    """Oldest first. Names differ between versions of lmms-eval, so other names count where the content does."""
    named = [file for file in folder.rglob("*results*.json") if file.is_file()]
    found = [file for file in named if _RESULTS_NAMES.fullmatch(file.name) or _holds_results(file)]
    recent = [file for file in found if file.stat().st_mtime >= not_before]
    if not recent:
        older = f" ({len(found)} of earlier runs are there)" if found else ""
        raise UserError(
            f"no lmms-eval results in {folder}{older}: nothing was evaluated, or the run failed. lmms-eval exits with "
            "0 even then; its error stands above 'Error during evaluation' in its output"
        )
    return sorted(recent, key=lambda file: (file.stat().st_mtime, file.name))


def _holds_results(file: Path) -> bool:
    """Whether a file is an lmms-eval results file; tasks leave submissions under similar names."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and isinstance(content.get("results"), dict) and bool(_BESIDE & set(content))


def read_results_file(file: Path) -> list[TaskResult]:
    """The tasks of a results file of any version; groups, which have no figures of their own, are left out.

    Raises:
        UserError: it is not a results file, or holds no task.
    """
    try:
        content = json.loads(file.read_text())
        groups = {name for name, members in (content.get("group_subtasks") or {}).items() if members}
        by_task = {
            task: values
            for task, values in content["results"].items()
            if task not in groups and isinstance(values, dict) and values.get(" ") != " "  # an empty group
        }
        model, config = _model_of(content), content.get("config") or {}
        limited = isinstance(config, dict) and config.get("limit") not in (None, 0, -1)
        results = [
            _task_result(task, values, model, (content.get("n-samples") or {}).get(task), limited, file)
            for task, values in by_task.items()
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is not an lmms-eval results file ({error!r}); run lmms-eval again") from error
    if not results:
        raise UserError(f"{file} has no results of any task; run lmms-eval again")
    return results


def _model_of(content: dict) -> str:
    """The model's name, which has moved between versions."""
    config = content.get("config") or content.get("model_configs") or {}
    values = (content.get("model_name"), *(config.get(key) for key in ("model_args", "model") if config))
    return next((str(value) for value in values if value), "unnamed model")


def _task_result(task: str, values: dict, model: str, samples: object, limited: bool, file: Path) -> TaskResult:
    counts = samples if isinstance(samples, dict) else {"effective": samples, "original": samples}
    effective, original = counts.get("effective"), counts.get("original")
    return TaskResult(
        task=task,
        model=model,
        figures=figures_of(values),
        documents=effective if isinstance(effective, int) else None,
        limited=limited or effective != original,
        file=file,
    )


def require_figures(results: Sequence[TaskResult]) -> None:
    """Check that every task has been scored, which lmms-eval's exit code does not tell.

    Raises:
        UserError: a task without a figure.
    """
    if empty := [result for result in results if not result.figures]:
        names = ", ".join(result.task for result in empty)
        raise UserError(
            f"{empty[0].file} has no figures for {names}: nothing was scored, or the task only writes a submission file"
        )
