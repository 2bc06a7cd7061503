"""`evotok-eval run`: evaluate a model on several tasks, one lmms-eval run each, and report all results together."""

import argparse
import ctypes
import hashlib
import importlib.metadata
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval_tasks.commands.report import show
from eval_tasks.reporting.results import read_results_file, require_figures
from eval_tasks.reporting.runs import make_run, read_run
from evotok_plugin.common.command_parser import examples_of
from evotok_plugin.common.digests import sha256_of_file
from evotok_plugin.common.files import check_output_folder, user_path, write_json, writing
from evotok_plugin.common.foreign_files import read_json
from evotok_plugin.common.progress import progress_environment
from evotok_plugin.errors import UserError

SCENE_TASKS = ("mmbench_scenes", "geneval_scenes", "evotok_reconstruction")
DONE = "finished.json"
SCENES, NUM_SCENES = "scenes", 300  # the images of evotok_reconstruction without --images
_SCENES_SEED = 20260312  # not used by any training corpus
_PR_SET_PDEATHSIG = 1


def add(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "run",
        epilog=examples_of(
            "evotok-eval run                                # the newest model of outputs/, the tasks of scenes",
            "evotok-eval run --model outputs/finetune --tasks mmbench_scenes geneval_scenes --limit 20",
            "NPROC=8 evotok-eval run --model outputs/finetune --tasks geneval evotok_understanding",
            text="Interruptible: rerun the same command, which skips the tasks that are finished.",
        ),
    )
    parser.add_argument(
        "--model", type=Path, help="output folder of a stage (default: the newest in outputs/, or the included model)"
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=list(SCENE_TASKS),
        help=f"tasks of lmms-eval or of this project (default: {' '.join(SCENE_TASKS)})",
    )
    parser.add_argument(
        "--limit", type=int, help="documents per task (evotok_reconstruction: images), for trial runs (default: all)"
    )
    parser.add_argument("--output", type=Path, help="folder for results (default: outputs/evaluation/<model>)")
    parser.add_argument("--images", type=Path, help="for evotok_reconstruction (default: a folder of rendered scenes)")
    parser.add_argument("--batch_size", default="32", help="questions or images per batch")
    parser.add_argument("--model_args", default="", help="for the model in lmms-eval: guidance_scale=5,dtype=bfloat16")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate, report, and list the failed tasks; returns 1 if there are any."""
    from evotok_plugin.common.run_lock import only_run  # a slow import, which flags do not need

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the same line and exit code as after Ctrl-C
    evaluation = open_evaluation(arguments)
    with only_run(evaluation.output):
        return _run_in_folder(evaluation, arguments.tasks)


def _run_in_folder(evaluation: "Evaluation", tasks: Sequence[str]) -> int:
    if "evotok_reconstruction" in tasks and evaluation.images == scene_images(evaluation.output):
        render_scenes(evaluation.output)
    failed = evaluate_all(evaluation, expand_suite(tasks))
    report(evaluation)
    for task, reason in failed.items():
        print(f"FAILED {task}: {reason}", file=sys.stderr)
    return 1 if failed else 0


# One evaluation ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The settings of an evaluation, and its tasks' folders of results.

    Attributes:
        weights: `weights_state` of the model.
    """

    model: Path
    output: Path
    limit: int | None
    batch_size: str
    model_args: str
    images: Path
    weights: str

    def folder(self, task: str) -> Path:
        return self.output / task

    def settings(self, task: str) -> dict[str, Any]:
        """Everything that a task's results depend on; results with other settings are not reused."""
        return {
            "task": task,
            "model": str(self.model),
            "weights": self.weights,
            "limit": self.limit,
            "model_args": self.model_args,
            "images": str(self.images) if task == "evotok_reconstruction" else None,
            "environment": {name: value for name, value in os.environ.items() if name.startswith("EVOTOK_")},
            "lmms_eval": importlib.metadata.version("lmms_eval"),
        }

    def is_finished(self, task: str) -> bool:
        """Whether a complete run with these settings exists."""
        try:
            if self._state(task)["settings"] != self.settings(task):
                return False
            results = self.results_file(task)
            if sha256_of_file(results) != self._state(task).get("sha256", sha256_of_file(results)):
                return False
            require_figures(read_results_file(results))
        except (OSError, ValueError, KeyError, TypeError):  # missing or damaged: run the task again
            return False
        return True

    def _state(self, task: str) -> dict[str, Any]:
        return read_json(self.folder(task) / DONE)

    def results_file(self, task: str) -> Path:
        return self.folder(task) / self._state(task)["results"]

    def command(self, task: str) -> list[str]:
        """The lmms-eval command, with NPROC processes."""
        launcher = ["-m", "lmms_eval"]
        if (processes := os.environ.get("NPROC", "1")) != "1":
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes, *launcher]
        arguments = f"pretrained={self.model},images_dir={self.folder(task) / 'images'}"
        return [
            sys.executable, *launcher, "--model", "evotok",
            "--model_args", f"{arguments},{self.model_args}" if self.model_args else arguments,
            "--tasks", task, "--batch_size", self.batch_size,
            "--output_path", str(self.folder(task)), "--log_samples", "--verbosity", "WARNING",
            *(["--limit", str(self.limit)] if self.limit and task != "evotok_reconstruction" else []),
        ]  # fmt: skip

    def environment(self, task: str) -> dict[str, str]:
        """The environment of the command; `evotok_reconstruction` gets its images and limit through variables."""
        environment = {**progress_environment(), **os.environ}
        if task == "evotok_reconstruction":
            environment["EVOTOK_RECONSTRUCTION_IMAGES"] = str(self.images)
            if self.limit:
                environment["EVOTOK_RECONSTRUCTION_LIMIT"] = str(self.limit)
        return environment

    def run(self, task: str) -> None:
        """Run a task in lmms-eval and read its results at once, since lmms-eval exits with 0 even on failure.

        Raises:
            UserError: the run left no complete results.
        """
        folder = self.folder(task)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / DONE).unlink(missing_ok=True)
        started = time.time()
        if code := _run_process(self.command(task), self.environment(task)):
            raise UserError(f"lmms-eval ended with exit code {code}")
        results = list(read_run(folder, not_before=started).tasks.values())
        require_figures(results)
        newest = max({result.file for result in results}, key=lambda file: file.stat().st_mtime)
        done = {"settings": self.settings(task), "results": str(newest.relative_to(folder))}
        write_json(folder / DONE, {**done, "sha256": sha256_of_file(newest)}, sync=True)


def _run_process(command: Sequence[str], environment: dict[str, str]) -> int:
    """Run a command that is terminated together with this process; returns its exit code.

    Raises:
        KeyboardInterrupt: Ctrl-C, SIGTERM or SIGHUP.
    """
    process = subprocess.Popen(command, env=environment, preexec_fn=_terminate_with_parent)
    try:
        return process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _terminate_with_parent() -> None:
    """On Linux: have the kernel send SIGTERM when the parent dies, so that a killed command leaves no evaluation."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


# Settings ------------------------------------------------------------------------------------------------------


def open_evaluation(arguments: argparse.Namespace) -> Evaluation:
    """Resolve the settings and check them before any model is loaded.

    Raises:
        UserError: lmms-eval is not installed, not a model folder, an invalid limit, or an output folder that cannot be
            written to.
    """
    from eval_tasks.tasks.evotok_reconstruction.task import IMAGES_VARIABLE
    from evotok_plugin.model_folder import model_type_of
    from llava_ext.configuration_evotok_llava import EvoTokLlavaConfig
    from llava_ext.model_folder import default_model_folder

    try:
        importlib.metadata.version("lmms_eval")
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError("evaluation needs lmms-eval: pip install 'evotok[eval]'") from error
    if arguments.limit is not None and arguments.limit < 1:
        raise UserError(f"--limit must be at least 1, got {arguments.limit}")
    model = user_path(arguments.model or default_model_folder()).resolve()
    if (kind := model_type_of(model)) != EvoTokLlavaConfig.model_type:
        raise UserError(
            f"--model {model} holds a {kind or 'nameless'} model, expected {EvoTokLlavaConfig.model_type}; pass the "
            "output folder of scripts/finetune.sh"
        )
    output = arguments.output or Path("outputs/evaluation") / "__".join(model.parts[-2:])
    output = user_path(output).resolve()
    check_output_folder(output, "--output")
    images = arguments.images or os.environ.get(IMAGES_VARIABLE) or scene_images(output)
    return Evaluation(
        model=model,
        output=output,
        limit=arguments.limit,
        batch_size=arguments.batch_size,
        model_args=arguments.model_args,
        images=user_path(images).resolve(),
        weights=weights_state(model),
    )


def weights_state(model: Path) -> str:
    """Hash the names, sizes and modification times of a model's files; it changes when the folder is trained again."""
    state = hashlib.sha256()
    for path in sorted(model.glob("*")):
        if path.suffix in (".safetensors", ".json", ".jinja") and path.name != "trainer_state.json":
            state.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}\n".encode())
    return state.hexdigest()


def scene_images(output: Path) -> Path:
    """The default image folder of `evotok_reconstruction`."""
    return output / SCENES / "val" / "images"


def render_scenes(output: Path) -> None:
    """Render the default images of `evotok_reconstruction`, unless an earlier run has done so."""
    from evotok_plugin.scenes.corpus import write_corpus

    images = scene_images(output)
    if not images.is_dir() or len(list(images.iterdir())) < NUM_SCENES:
        print(f"no --images for evotok_reconstruction: rendering {NUM_SCENES} scenes to {images}", flush=True)
        write_corpus(output / SCENES, num_train=0, num_val=NUM_SCENES, seed=_SCENES_SEED)


def expand_suite(tasks: Sequence[str]) -> list[str]:
    """Replace the understanding suite by its benchmarks, so that an interruption loses one benchmark at most."""
    from eval_tasks.tasks.evotok_understanding.task import suite

    members = [member for task in tasks for member in (suite() if task == "evotok_understanding" else [task])]
    return list(dict.fromkeys(members))


# All tasks -----------------------------------------------------------------------------------------------------


def evaluate_all(evaluation: Evaluation, tasks: Sequence[str]) -> dict[str, str]:
    """Run all tasks that are not finished, also after a failure; returns the failed tasks with their errors."""
    failed = {}
    for number, task in enumerate(tasks, start=1):
        title = f"[{number}/{len(tasks)}] {task}"
        if evaluation.is_finished(task):
            print(f"=== {title}: finished before", flush=True)
            continue
        print(f"\n=== {title}", flush=True)
        started = time.monotonic()
        try:
            evaluation.run(task)
        except UserError as error:
            failed[task] = str(error)
        outcome = "FAILED" if task in failed else "finished"
        print(f"=== {title}: {outcome} after {time.monotonic() - started:.0f} s", flush=True)
    return failed


def report(evaluation: Evaluation) -> None:
    """Print and write the report card of all tasks finished with these settings, in this run or before."""
    tasks = sorted(path.parent.name for path in evaluation.output.glob(f"*/{DONE}"))
    files = [evaluation.results_file(task) for task in tasks if evaluation.is_finished(task)]
    if files:
        print(flush=True)
        show([make_run(evaluation.output.name, files)], evaluation.output / "report")
