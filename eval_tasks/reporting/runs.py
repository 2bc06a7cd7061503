"""What lmms-eval has left in a folder: figures by task, and what makes them comparable or not."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eval_tasks.results import RESULTS_NAME, figures_of


@dataclass(frozen=True)
class TaskResult:
    """One task's figures.

    Attributes:
        model: what was evaluated, as lmms-eval names it.
        figures: by metric; keys are `metric`, or `metric,filter` where a filter has a name.
        documents, limited: how many of how many documents were asked, and whether that is fewer.
        file: where this stands.
    """

    task: str
    model: str
    figures: dict[str, float]
    documents: int
    limited: bool
    file: Path


@dataclass(frozen=True)
class Run:
    """The results of one model, by task: the newest of each."""

    name: str
    model: str
    tasks: dict[str, TaskResult]


def read_run(path: str | Path, name: str | None = None, not_before: float = 0.0) -> Run:
    """All tasks of all results files below a folder, or of one file; of a task's several the newest.

    Args:
        name: of the run, by default the folder's or the file's.
        not_before: seconds since the epoch; older files belong to an earlier run.

    Raises:
        ValueError: nothing there, a file that cannot be read, a task without figures, or results of several models.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist; expected the output folder of lmms-eval or scripts/evaluate.sh")
    files = [path] if path.is_file() else _results_files(path, not_before)
    return make_run(name or (path.stem if path.is_file() else path.resolve().name), files)


def make_run(name: str, files: Sequence[Path]) -> Run:
    """The tasks of results files, later ones over earlier ones.

    Raises:
        ValueError: a file that cannot be read, a task without figures, or results of several models.
    """
    tasks = {result.task: result for file in files for result in read_results_file(file)}
    by_model = {result.model: result for result in tasks.values()}
    if len(by_model) > 1:
        places = "; ".join(f"{model} in {result.file.parent}" for model, result in by_model.items())
        raise ValueError(f"{name} would have results of several models ({places}); give their folders one by one")
    return Run(name, next(iter(by_model)), tasks)


def _results_files(folder: Path, not_before: float) -> list[Path]:
    """Oldest first."""
    found = [file for file in folder.rglob("*_results.json") if RESULTS_NAME.fullmatch(file.name)]
    recent = [file for file in found if file.stat().st_mtime >= not_before]
    if not recent:
        older = f" ({len(found)} of earlier runs are there)" if found else ""
        raise ValueError(
            f"no lmms-eval results in {folder}{older}: nothing was evaluated, or the run failed. lmms-eval exits with "
            "0 even then; its error stands above 'Error during evaluation' in its output"
        )
    return sorted(recent, key=lambda file: (file.stat().st_mtime, file.name))


def read_results_file(file: Path) -> list[TaskResult]:
    """The tasks of a results file; groups, which have no figures of their own, are passed over.

    Raises:
        ValueError: it is no results file, or a task has no figure, which is how an empty run shows.
    """
    try:
        content = json.loads(file.read_text())
        groups = {name for name, members in content.get("group_subtasks", {}).items() if members}
        by_task = {
            task: values
            for task, values in content["results"].items()
            if task not in groups and values.get(" ") != " "  # an empty group
        }
        samples = {task: content.get("n-samples", {}).get(task, {}) for task in by_task}
        model = str(content.get("model_name") or content["config"]["model_args"])
        results = [
            TaskResult(
                task=task,
                model=model,
                figures=figures_of(values),
                documents=int(samples[task].get("effective", 0)),
                limited=samples[task].get("effective") != samples[task].get("original"),
                file=file,
            )
            for task, values in by_task.items()
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not an lmms-eval results file ({error!r}); run lmms-eval again") from error
    empty = [result.task for result in results if not result.figures]
    if empty or not results:
        raise ValueError(f"{file} has no figures for {', '.join(empty) or 'any task'}: nothing was answered or scored")
    return results
