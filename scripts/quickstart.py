"""Run every stage of the embedded default in order, then show the results: one table and two pictures.

    python scripts/quickstart.py                 # about 20 minutes with two idle cores
    python scripts/quickstart.py --fast --workspace outputs/fast

Interruptible: rerun the same command to resume. docs/quickstart.md explains the stages.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from evotok_plugin.common import command_line
from evotok_plugin.common.command_parser import CommandParser
from evotok_plugin.common.files import write_json, write_text, writing
from evotok_plugin.common.pictures import labeled_rows
from evotok_plugin.common.recipes import check_seed
from evotok_plugin.errors import UserError
from evotok_plugin.scenes.captions import scene_prompts
from evotok_plugin.scenes.scene import SKILLS

WORKSPACE = Path("outputs/quickstart")
TASKS = ("mmbench_scenes", "geneval_scenes")
STAGE_SEED = 42  # transformers' default
FAST_STEPS = {"pretrain": 20, "finetune": 40, "reinforce": 2}
MODEL = "reinforce"  # the folder of the last stage
EVAL_LIMIT_FAST = 12
# Everything that a run writes to the workspace.
OUTPUTS = (
    "scenes", "backbone", "teacher", "evotok", "codes", "pretrain", "finetune", "reinforce", "reconstruction.json",
    "reconstruction.png", "bad_samples.jsonl", "drawn.png", "geneval_images", "lmms_eval", "results.json",
    "run.json",
)  # fmt: skip


T = TypeVar("T")


def read(file: Path, convert: Callable[[Any], T], remedy: str) -> T:
    """Read a JSON file and convert its content.

    Raises:
        UserError: the file cannot be read, or `convert` rejects its content.
    """
    try:
        return convert(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise UserError(f"{file} is damaged or missing ({error!r}); {remedy}") from error


@dataclass(frozen=True)
class Settings:
    """The settings of a run.

    Attributes:
        workspace: folder for everything that the run writes.
        fast: far fewer steps.
        seed: seed of the corpus and of the preparation; the training stages have 42 + `seed`.
    """

    workspace: Path = WORKSPACE
    fast: bool = False
    seed: int = 0


class Quickstart:
    """The stages of a run and their durations, recorded so that an interrupted run can be resumed."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._state_file = settings.workspace / "run.json"
        self.seconds: dict[str, float] = {}
        self._begin()

    def _begin(self) -> None:
        """Resume an unfinished run of the same kind; move the files of any other run to a new folder."""
        state = self._read_state()
        same = state.get("fast") == self.settings.fast and state.get("seed", 0) == self.settings.seed
        if same and not state.get("finished"):
            self.seconds = state["seconds"]
            print(f"resuming after: {', '.join(self.seconds) or 'nothing'}", flush=True)
        else:
            with writing(self.settings.workspace):
                self.settings.workspace.mkdir(parents=True, exist_ok=True)
                if state:
                    self._move_previous()
        self._write_state(finished=False)

    def _read_state(self) -> dict[str, Any]:
        if not self._state_file.is_file():
            return {}

        def state_of(content: Any) -> dict[str, Any]:
            if content:
                sum(content["seconds"].values())  # raises an error unless it maps names to numbers
            return dict(content)

        return read(self._state_file, state_of, "delete it to start a new run")

    def _move_previous(self) -> None:
        number, workspace = 1, self.settings.workspace
        while (previous := workspace / f"previous-{number}").exists():
            number += 1
        previous.mkdir()
        for name in OUTPUTS:
            if (workspace / name).exists():
                os.replace(workspace / name, previous / name)
        print(f"moved the previous run from {workspace} to {previous}; delete it if you do not need it", flush=True)

    def _write_state(self, finished: bool) -> None:
        state = {"fast": self.settings.fast, "seed": self.settings.seed}
        write_json(self._state_file, {**state, "seconds": self.seconds, "finished": finished})

    def stage(self, name: str, work: Callable[[], None]) -> None:
        """Run a stage unless it is finished, and record its duration."""
        if name in self.seconds:
            return
        print(f"\n=== {name}", flush=True)
        started = time.monotonic()
        work()
        self.seconds[name] = round(time.monotonic() - started, 1)
        print(f"=== {name}: {self.seconds[name]:.0f} s", flush=True)
        self._write_state(finished=False)

    def finish(self) -> None:
        """Mark the run as finished, so that the next one starts from scratch."""
        self._write_state(finished=True)


def run(*command: str) -> None:
    """Run a command; if it fails, exit with its code."""
    result = subprocess.run(command)
    if result.returncode:
        print(f"error: {' '.join(command)} ended with exit code {result.returncode}", file=sys.stderr)
        sys.exit(result.returncode)


# Stages --------------------------------------------------------------------------------------------------------


def prepare(settings: Settings) -> None:
    """Render the corpus, and train the text tokenizer, the teacher and the image tokenizer."""
    run(
        sys.executable, "-m", "llava_ext.embedded.prepare", "--workspace", str(settings.workspace),
        "--preparation_seed", str(settings.seed), *(["--fast"] if settings.fast else []),
    )  # fmt: skip


def prepared_seconds(workspace: Path) -> dict[str, float]:
    """The duration of each step of `prepare`."""
    from llava_ext.embedded.prepare import DONE, STEPS

    seconds = {}
    for name in STEPS:
        file = workspace / name / DONE
        remedy = f"delete {workspace / name} and {workspace / 'run.json'} to start again"
        seconds[name] = read(file, lambda content: float(content["seconds"]), remedy)
    return seconds


def train(stage: str, settings: Settings) -> None:
    """Run a training stage of the MLLM."""
    steps = ["--max_steps", str(FAST_STEPS[stage])] if settings.fast else []
    seed = ["--seed", str(STAGE_SEED + settings.seed)]
    run("bash", f"scripts/{stage}.sh", "--workspace", str(settings.workspace), *seed, *steps)


def reconstruct(workspace: Path) -> None:
    """Measure the tokenizer on held-out scenes, and show reconstructions."""
    images = workspace / "scenes" / "val" / "images"
    tokenizer = str(workspace / "evotok")
    evotok = (sys.executable, "-m", "evotok_plugin.cli")
    run(*evotok, "evaluate", str(images), "--model", tokenizer, "-o", str(workspace / "reconstruction.json"))
    some = sorted(images.glob("*.png"))[:12]
    run(*evotok, "reconstruct", *map(str, some), "--model", tokenizer, "-o", str(workspace / "reconstruction.png"))


def draw_skills(workspace: Path) -> None:
    """Draw four images for one prompt of each skill."""
    import numpy as np

    from llava_ext.model_folder import load_model

    model, processor = load_model(workspace / MODEL)
    rng = np.random.default_rng(7)
    prompts = [scene_prompts(skill, 1, rng)[0]["prompt"] for skill in SKILLS]
    images = model.generate_images(prompts, processor=processor, num_images=4, batch_size=24, seed=0)
    rows = {prompt: images[4 * i : 4 * i + 4] for i, prompt in enumerate(prompts)}
    labeled_rows(rows, scale=3).save(workspace / "drawn.png")


def evaluate(settings: Settings) -> None:
    """Evaluate both tasks with lmms-eval, and check its results, since it exits with 0 even on failure."""
    from eval_tasks.reporting.results import read_results

    workspace, started = settings.workspace, time.time()
    limit = ["--limit", str(EVAL_LIMIT_FAST)] if settings.fast else []
    run(
        sys.executable, "-m", "lmms_eval", "--model", "evotok",
        "--model_args", f"pretrained={workspace / MODEL},images_dir={workspace / 'geneval_images'}",
        "--tasks", ",".join(TASKS), "--batch_size", "64",
        "--output_path", str(workspace / "lmms_eval"), "--log_samples", *limit,
    )  # fmt: skip
    read_results(workspace / "lmms_eval", TASKS, not_before=started)


# Results -------------------------------------------------------------------------------------------------------


def collect(workspace: Path, seconds: dict[str, float]) -> dict[str, Any]:
    """Collect all results and write them to results.json."""
    from eval_tasks.reporting.results import read_results

    scores = read_results(workspace / "lmms_eval", TASKS)
    file = workspace / "reconstruction.json"
    psnr = read(file, lambda content: float(content["psnr"]), f"delete {workspace / 'run.json'} to start again")
    results = {
        "reconstruction": {"psnr": psnr},
        "mmbench_scenes": scores["mmbench_scenes"],
        "geneval_scenes": scores["geneval_scenes"],
        "seconds": seconds,
    }
    write_text(workspace / "results.json", json.dumps(results, indent=2) + "\n")
    return results


def print_table(workspace: Path, results: dict[str, Any]) -> None:
    """Print the results, the durations, and the paths of the pictures."""
    understanding, drawing = results["mmbench_scenes"], results["geneval_scenes"]
    print("\n| metric | score | baseline |")
    print("|---|---|---|")
    print(f"| reconstruction of held-out scenes, PSNR | {results['reconstruction']['psnr']:.2f} dB | |")
    print(f"| mmbench_scenes, accuracy | {understanding['overall']:.3f} | chance {understanding['chance']:.3f} |")
    print(f"| geneval_scenes, overall | {drawing['overall']:.3f} | shuffled prompts {drawing['baseline']:.3f} |")
    for skill in SKILLS:
        print(f"| - {skill} | {drawing[skill]:.3f} | |")
    total = sum(results["seconds"].values())
    stages = ", ".join(f"{name} {value:.0f}" for name, value in results["seconds"].items())
    print(f"\n{total:.0f} s in total: {stages}")
    print(f"results:         {workspace / 'results.json'}")
    print(f"reconstructions: {workspace / 'reconstruction.png'}")
    print(f"drawn images:    {workspace / 'drawn.png'}")
    prompt = "a photo of a red circle above a blue square"
    print(f'\ntry: evotok-llava draw "{prompt}" -n 4 -o out/ --model {workspace / MODEL}')


# Command line --------------------------------------------------------------------------------------------------


def run_all(arguments: argparse.Namespace) -> None:
    """Run all stages that are not finished, and print the results."""
    check_seed(arguments.seed, bits=31)
    settings = Settings(arguments.workspace, arguments.fast, arguments.seed)
    workspace = settings.workspace
    quickstart = Quickstart(settings)
    quickstart.stage("prepare", lambda: prepare(settings))
    quickstart.stage("pretrain", lambda: train("pretrain", settings))
    quickstart.stage("finetune", lambda: train("finetune", settings))
    quickstart.stage("reinforce", lambda: train("reinforce", settings))
    quickstart.stage("reconstruction", lambda: reconstruct(workspace))
    quickstart.stage("drawing", lambda: draw_skills(workspace))
    quickstart.stage("lmms_eval", lambda: evaluate(settings))
    seconds = {name: value for name, value in quickstart.seconds.items() if name != "prepare"}
    print_table(workspace, collect(workspace, {**prepared_seconds(workspace), **seconds}))
    quickstart.finish()


def main() -> int:
    parser = CommandParser(description=__doc__)
    parser.add_argument(
        "--fast", action="store_true", help="far fewer steps: the models learn little, but every stage runs"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the corpus and of all training")
    parser.add_argument("--workspace", type=Path, default=WORKSPACE, help="folder for all results")
    return command_line.run(parser, work=run_all, stopped="stopped; rerun the command to resume")


if __name__ == "__main__":
    sys.exit(main())
