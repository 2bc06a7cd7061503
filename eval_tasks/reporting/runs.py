"""The results of one model, collected from the results files of one or several lmms-eval runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eval_tasks.reporting.results import TaskResult, read_results_file, results_files
from evotok_plugin.errors import UserError


@dataclass(frozen=True)
class Run:
    """The results of one model.

    Attributes:
        tasks: the newest result of each task.
        unreadable: an error for each results file that cannot be read.
    """

    name: str
    model: str
    tasks: dict[str, TaskResult]
    unreadable: tuple[str, ...] = ()


def read_run(path: str | Path, name: str | None = None, not_before: float = 0.0) -> Run:
    """Read one results file, or all below a folder; of several results of a task the newest counts.

    Args:
        name: the run's name, by default that of the folder or file.
        not_before: seconds since the epoch; older files belong to an earlier run.

    Raises:
        UserError: the path does not exist, or holds no readable results or those of several models.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist; expected the output folder of lmms-eval or scripts/evaluate.sh")
    files = [path] if path.is_file() else results_files(path, not_before)
    return make_run(name or (path.stem if path.is_file() else path.resolve().name), files)


def make_run(name: str, files: Sequence[Path]) -> Run:
    """Combine results files, later ones taking precedence; unreadable files are listed in the run.

    Raises:
        UserError: no readable file, or results of several models.
    """
    tasks: dict[str, TaskResult] = {}
    unreadable: dict[Path, str] = {}
    for file in files:
        try:
            tasks |= {result.task: result for result in read_results_file(file)}
        except UserError as error:
            unreadable[file] = str(error)
    if not tasks:
        raise UserError(next(iter(unreadable.values()), f"{name} has no results of any task"))
    by_model = {result.model: result for result in tasks.values()}
    if len(by_model) > 1:
        places = "; ".join(f"{model} in {result.file.parent}" for model, result in by_model.items())
        raise UserError(f"{name} holds results of several models ({places}); pass their folders one by one")
    return Run(name, next(iter(by_model)), tasks, tuple(unreadable.values()))
