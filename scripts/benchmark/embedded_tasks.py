"""Runs of lmms-eval on the embedded tasks in this process and without a network, shared by the benchmarks."""

import argparse
import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import eval_tasks


def evaluate(lm: Any, tasks: Sequence[str], limit: int | None, output: Path) -> dict[str, dict[str, Any]]:
    """Run tasks without their printed tables; returns lmms-eval's results by task.

    Args:
        lm: an adapter of lmms-eval.
        limit: documents of each task; None: all.
        output: folder for lmms-eval's files.
    """
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    manager = TaskManager(
        include_path=str(Path(eval_tasks.__file__).parent / "tasks"), include_defaults=False, model_name="evotok"
    )
    command = argparse.Namespace(output_path=str(output), process_with_media=False, reasoning_tags=None)
    with contextlib.redirect_stdout(io.StringIO()):
        found = simple_evaluate(
            model=lm, tasks=list(tasks), limit=limit, task_manager=manager, cli_args=command, bootstrap_iters=0
        )
    results: dict[str, dict[str, Any]] = found["results"]
    return results
