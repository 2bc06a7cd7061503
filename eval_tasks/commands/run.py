"""Evaluate a model on task after task, each an lmms-eval run of its own, and make one report of all results."""

import argparse
import ctypes
import hashlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from evotok_plugin.common.progress import progress_environment
from evotok_plugin.errors import UserError

SCENE_TASKS = ("mmbench_scenes", "geneval_scenes", "evotok_reconstruction")
DONE = "finished.json"
SCENES, NUM_SCENES = "scenes", 300  # drawn for evotok_reconstruction where no images are named
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is evaluated, how, and where results go."""

    model: Path
    output: Path
    limit: int | None
    batch_size: str
    model_args: str
    images: Path
    weights: str

    def folder(self, task: str) -> Path:
        return self.output / task

    def settings(self, task: str) -> dict:
        """What a task's results depend on; results of other settings are not taken for these."""
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
        """Whether a whole run with these settings is there."""
        from eval_tasks.reporting.runs import read_results_file, require_figures

        try:
            if self._state(task)["settings"] != self.settings(task):
                return False
            require_figures(read_results_file(self.results_file(task)))
        except (OSError, ValueError, KeyError):
            return False
        return True

    def _state(self, task: str) -> dict:
        return json.loads((self.folder(task) / DONE).read_text())

    def results_file(self, task: str) -> Path:
        return self.folder(task) / self._state(task)["results"]

    def command(self, task: str) -> list[str]:
        """lmms-eval's, over as many processes as NPROC says."""
        launcher = ["-m", "lmms_eval"]
        if (processes := os.environ.get("NPROC", "1")) != "1":
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes, *launcher]
        arguments = f"pretrained={self.model},images_dir={self.folder(task) / 'images'}"
        return [
            sys.executable, *launcher, "--model", "evotok",
            "--model_args", f"{arguments},{self.model_args}" if self.model_args else arguments,
            "--tasks", task, "--batch_size", self.batch_size,
            "--output_path", str(self.folder(task)), "--log_samples",
            *(["--limit", str(self.limit)] if self.limit and task != "evotok_reconstruction" else []),
        ]  # fmt: skip

    def environment(self, task: str) -> dict[str, str]:
        environment = {**progress_environment(), **os.environ}
        if task == "evotok_reconstruction":
            environment["EVOTOK_RECONSTRUCTION_IMAGES"] = str(self.images)
            if self.limit:
                environment["EVOTOK_RECONSTRUCTION_LIMIT"] = str(self.limit)
        return environment

    def run(self, task: str) -> None:
        """One lmms-eval run, whose results are read at once: its exit code does not tell failure.

        Raises:
            UserError: it has left no whole results.
        """
        from eval_tasks.reporting.runs import read_run, require_figures

        folder = self.folder(task)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / DONE).unlink(missing_ok=True)
        started = time.time()
        code = _run_to_its_end(self.command(task), self.environment(task))
        if code:
            raise UserError(f"lmms-eval ended with exit code {code}")
        results = list(read_run(folder, not_before=started).tasks.values())
        require_figures(results)
        newest = max({result.file for result in results}, key=lambda file: file.stat().st_mtime)
        state = {"settings": self.settings(task), "results": str(newest.relative_to(folder))}
        temporary = folder / f"{DONE}.tmp"
        temporary.write_text(json.dumps(state, indent=1) + "\n")
        os.replace(temporary, folder / DONE)


def _run_to_its_end(command: list[str], environment: dict[str, str]) -> int:
    """Run a command that ends with this process, also when that is stopped; its exit code.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM.
    """
    process = subprocess.Popen(command, env=environment, preexec_fn=_end_with_parent)
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


def _end_with_parent() -> None:
    """A killed script leaves no evaluation behind that would work beside the next one's (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


# What to evaluate ----------------------------------------------------------------------------------------------


def add(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("run", help="run tasks one after another in lmms-eval and report all results")
    parser.add_argument("--model", type=Path, help="output folder of scripts/finetune.sh (default: the newest)")
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=list(SCENE_TASKS),
        help=f"of lmms-eval and ours (default: {' '.join(SCENE_TASKS)})",
    )
    parser.add_argument("--limit", type=int, help="documents a task, images for evotok_reconstruction; for trials")
    parser.add_argument("--output", type=Path, help="folder of results (default: outputs/evaluation/<model>)")
    parser.add_argument("--images", type=Path, help="for evotok_reconstruction (default: scenes that are drawn)")
    parser.add_argument("--batch_size", default="32", help="questions and images at once")
    parser.add_argument("--model_args", default="", help="for the model in lmms-eval: guidance_scale=5,dtype=bfloat16")
    parser.set_defaults(run=run)


def open_evaluation(arguments: argparse.Namespace) -> Evaluation:
    """Check what can be checked before a model works.

    Raises:
        UserError: no model, no images, or a limit that means nothing.
    """
    from eval_tasks.tasks.evotok_reconstruction.task import IMAGES_VARIABLE
    from evotok_plugin.common.files import check_output_folder
    from llava_ext.model_folder import default_model_folder

    if arguments.limit is not None and arguments.limit < 1:
        raise UserError(f"--limit must be at least 1, got {arguments.limit}")
    model = (arguments.model or default_model_folder()).expanduser().resolve()
    if not (model / "config.json").is_file():
        raise UserError(f"--model {model} is no model folder: it does not exist or holds no config.json")
    output = arguments.output or Path("outputs/evaluation") / "__".join(model.parts[-2:])
    output = output.expanduser().resolve()
    check_output_folder(output, "--output")
    images = arguments.images or os.environ.get(IMAGES_VARIABLE) or output / SCENES / "val" / "images"
    if images == output / SCENES / "val" / "images" and "evotok_reconstruction" in arguments.tasks:
        draw_scenes(output / SCENES)
    return Evaluation(
        model=model,
        output=output,
        limit=arguments.limit,
        batch_size=arguments.batch_size,
        model_args=arguments.model_args,
        images=Path(images).expanduser().resolve(),
        weights=weights_state(model),
    )


def weights_state(model: Path) -> str:
    """Tells a model's files from those of a later training in the same folder: names, sizes, times."""
    state = hashlib.sha256()
    for path in sorted(model.glob("*")):
        if path.suffix in (".safetensors", ".json", ".jinja") and path.name != "trainer_state.json":
            state.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}\n".encode())
    return state.hexdigest()


def draw_scenes(folder: Path) -> None:
    """Scenes of a seed that no training uses, to rebuild, in `folder/val/images`; drawn once."""
    from evotok_plugin.scenes.corpus import write_corpus

    images = folder / "val" / "images"
    if not images.is_dir() or len(list(images.iterdir())) < NUM_SCENES:
        print(f"no --images for evotok_reconstruction: {NUM_SCENES} scenes are drawn to {images}", flush=True)
        write_corpus(folder, num_train=0, num_val=NUM_SCENES, seed=20260312)


# All of it -----------------------------------------------------------------------------------------------------


def one_by_one(tasks: list[str]) -> list[str]:
    """The understanding suite as its benchmarks, which take hours each: what is stopped has lost no more than one."""
    from eval_tasks.tasks.evotok_understanding.task import suite

    members = [member for task in tasks for member in (suite() if task == "evotok_understanding" else [task])]
    return list(dict.fromkeys(members))


def evaluate_all(evaluation: Evaluation, tasks: list[str]) -> dict[str, str]:
    """Run what is not finished, whatever fails; the failed tasks and why."""
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
        except ValueError as error:
            failed[task] = str(error)
        outcome = "FAILED" if task in failed else "finished"
        print(f"=== {title}: {outcome} after {time.monotonic() - started:.0f} s", flush=True)
    return failed


def report(evaluation: Evaluation) -> None:
    """The table and the plot of all tasks that are finished with these settings, now or before."""
    from eval_tasks.commands.report import show
    from eval_tasks.reporting.runs import make_run

    tasks = sorted(path.parent.name for path in evaluation.output.glob(f"*/{DONE}"))
    files = [evaluation.results_file(task) for task in tasks if evaluation.is_finished(task)]
    if files:
        print(flush=True)
        show([make_run(evaluation.output.name, files)], evaluation.output / "report")


def run(arguments: argparse.Namespace) -> int:
    """Evaluate, report, and name the failed tasks; 1 if there are any."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    evaluation = open_evaluation(arguments)
    failed = evaluate_all(evaluation, one_by_one(arguments.tasks))
    report(evaluation)
    for task, reason in failed.items():
        print(f"FAILED {task}: {reason}", file=sys.stderr)
    return 1 if failed else 0
