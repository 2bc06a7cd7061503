"""The figures of an lmms-eval run, read from its output folder; lmms-eval itself exits with 0 when it fails."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from evotok_plugin.errors import UserError

# `20260731_120000_results.json`; tasks leave other *_results.json beside it.
RESULTS_NAME = re.compile(r"\d{8}_\d{6}_results\.json")
_NOT_METRICS = ("alias", "name", "samples", "sample_len", "sample_count")


def newest_results_file(output_dir: str | Path, not_before: float = 0.0) -> Path:
    """The last results file below a folder.

    Args:
        not_before: seconds since the epoch; older files belong to an earlier run.

    Raises:
        UserError: there is none, which is how a failed lmms-eval run shows.
    """
    found = [path for path in Path(output_dir).rglob("*_results.json") if RESULTS_NAME.fullmatch(path.name)]
    recent = [path for path in found if path.stat().st_mtime >= not_before]
    if not recent:
        older = f" ({len(found)} of earlier runs are there)" if found else ""
        raise UserError(
            f"no lmms-eval results in {output_dir}{older}: the run failed. lmms-eval exits with 0 even then; its "
            "error stands above 'Error during evaluation' in its output"
        )
    return max(recent, key=lambda path: (path.stat().st_mtime, path.name))


def read_results(
    output_dir: str | Path, tasks: Sequence[str] = (), not_before: float = 0.0
) -> dict[str, dict[str, float]]:
    """The newest run's metrics, {task: {metric: value}}.

    Args:
        tasks: names that must be among the results.
        not_before: start of the run (`time.time()`), so that an earlier run's file is not taken for this one's.

    Raises:
        UserError: no results, an unreadable file, or a task without any figure.
    """
    path = newest_results_file(output_dir, not_before)
    try:
        content = json.loads(path.read_text())
        by_task = content["results"]
        groups = {name for name, members in content.get("group_subtasks", {}).items() if members}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not an lmms-eval results file ({error}); run lmms-eval again") from error
    results = {task: figures_of(values) for task, values in by_task.items()}
    results = {task: figures for task, figures in results.items() if figures or task not in groups}
    empty = [task for task in {**dict.fromkeys(tasks), **results} if not results.get(task)]
    if empty or not results:
        raise UserError(f"{path} has no figures for {', '.join(empty) or 'any task'}; it has {sorted(results)}")
    return results


def figures_of(values: dict) -> dict[str, float]:
    """Numbers by metric of one task's row, whose keys are `metric,filter`; the filter `none` is left out.

    Rows of versions before filters have bare metrics.
    """
    figures, has_filters = {}, any("," in key for key in values)
    for key, value in values.items():
        metric, _, selection = key.partition(",")
        if not has_filters and key not in _NOT_METRICS:
            selection = "none"
        if not selection or "_stderr" in metric or isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        figures[metric if selection == "none" else key] = float(value)
    return figures
