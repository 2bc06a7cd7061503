"""Run every stage of the embedded default in order, then show what was learned: one table and three pictures."""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

WORKSPACE = Path("outputs/quickstart")
SKILLS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
FAST_STEPS = {"pretrain": 20, "finetune": 40}
EVAL_LIMIT_FAST = 12
# What a run leaves in the workspace.
OUTPUTS = (
    "scenes", "backbone", "teacher", "evotok", "codes", "pretrain", "finetune", "reconstruction.json",
    "reconstruction.png", "bad_samples.jsonl", "evolution", "drawn.png", "geneval_images", "lmms_eval", "results.json",
    "run.json",
)  # fmt: skip


class Quickstart:
    """The stages, their times, and what an interrupted run had finished."""

    def __init__(self, fast: bool) -> None:
        self.fast = fast
        self._state_file = WORKSPACE / "run.json"
        self.seconds: dict[str, float] = {}
        self._begin()

    def _begin(self) -> None:
        """Resume an unfinished run of the same kind; another run is moved into a folder of its own, nothing is
        deleted."""
        state = json.loads(self._state_file.read_text()) if self._state_file.is_file() else {}
        if state.get("fast") == self.fast and not state.get("finished"):
            self.seconds = state["seconds"]
            print(f"going on after: {', '.join(self.seconds) or 'nothing'}", flush=True)
        else:
            WORKSPACE.mkdir(parents=True, exist_ok=True)
            if state:
                self._keep_previous()
        self._write_state(finished=False)

    def _keep_previous(self) -> None:
        number = 1
        while (previous := WORKSPACE / f"previous-{number}").exists():
            number += 1
        previous.mkdir()
        for name in OUTPUTS:
            if (WORKSPACE / name).exists():
                os.replace(WORKSPACE / name, previous / name)
        print(f"the run that was in {WORKSPACE} is now in {previous}; delete it when it is not needed", flush=True)

    def _write_state(self, finished: bool) -> None:
        temporary = self._state_file.with_suffix(".tmp")
        temporary.write_text(json.dumps({"fast": self.fast, "seconds": self.seconds, "finished": finished}))
        os.replace(temporary, self._state_file)

    def stage(self, name: str, work: Callable[[], None]) -> None:
        """Run a stage unless it is done, and note how long it took."""
        if name in self.seconds:
            return
        print(f"\n=== {name}", flush=True)
        started = time.monotonic()
        work()
        self.seconds[name] = round(time.monotonic() - started, 1)
        print(f"=== {name}: {self.seconds[name]:.0f} s", flush=True)
        self._write_state(finished=False)

    def finish(self) -> None:
        self._write_state(finished=True)


def run(*command: str) -> None:
    """Run a command and stop the quickstart when it fails."""
    result = subprocess.run(command)
    if result.returncode:
        print(f"error: {' '.join(command)} ended with exit code {result.returncode}", file=sys.stderr)
        sys.exit(result.returncode)


def prepare(fast: bool) -> None:
    run(
        sys.executable, "-m", "llava_ext.embedded.prepare", "--workspace", str(WORKSPACE), *(["--fast"] if fast else [])
    )


def prepared_seconds() -> dict[str, float]:
    """How long each part of `prepare` took, as it noted itself."""
    from llava_ext.embedded.prepare import DONE, STEPS

    return {name: json.loads((WORKSPACE / name / DONE).read_text())["seconds"] for name in STEPS}


def train(stage: str, fast: bool) -> None:
    steps = ["--max_steps", str(FAST_STEPS[stage])] if fast else []
    run("bash", f"scripts/{stage}.sh", "--workspace", str(WORKSPACE), *steps)


def reconstruct() -> None:
    """Measure the tokenizer on held-out scenes; draw originals over reconstructions, and what each level adds."""
    images = WORKSPACE / "scenes" / "val" / "images"
    tokenizer = str(WORKSPACE / "evotok")
    evotok = (sys.executable, "-m", "evotok_plugin.cli")
    run(*evotok, "evaluate", str(images), "--model", tokenizer, "-o", str(WORKSPACE / "reconstruction.json"))
    some = sorted(images.glob("*.png"))[:12]
    run(*evotok, "reconstruct", *map(str, some), "--model", tokenizer, "-o", str(WORKSPACE / "reconstruction.png"))
    teacher, evolution = str(WORKSPACE / "teacher"), str(WORKSPACE / "evolution")
    run(*evotok, "evolve", str(images), "--model", tokenizer, "--teacher", teacher, "-o", evolution)


def draw_skills() -> None:
    """Draw four images for one prompt of each skill."""
    import numpy as np

    from evotok_plugin.common.pictures import labeled_rows
    from evotok_plugin.scenes.captions import scene_prompts
    from llava_ext.model_folder import load_model

    model, processor = load_model(WORKSPACE / "finetune")
    rng = np.random.default_rng(7)
    prompts = [scene_prompts(skill, 1, rng)[0]["prompt"] for skill in SKILLS]
    images = model.generate_images(prompts, processor=processor, num_images=4, batch_size=24, seed=0)
    rows = {prompt: images[4 * i : 4 * i + 4] for i, prompt in enumerate(prompts)}
    labeled_rows(rows, scale=3).save(WORKSPACE / "drawn.png")


def evaluate(fast: bool) -> None:
    """Both tasks through lmms-eval; its exit code does not tell failure, so its results are read at once."""
    from eval_tasks.reporting.results import read_results

    started = time.time()
    limit = ["--limit", str(EVAL_LIMIT_FAST)] if fast else []
    run(
        sys.executable, "-m", "lmms_eval", "--model", "evotok",
        "--model_args", f"pretrained={WORKSPACE / 'finetune'},images_dir={WORKSPACE / 'geneval_images'}",
        "--tasks", "mmbench_scenes,geneval_scenes", "--batch_size", "64",
        "--output_path", str(WORKSPACE / "lmms_eval"), "--log_samples", *limit,
    )  # fmt: skip
    read_results(WORKSPACE / "lmms_eval", tasks=("mmbench_scenes", "geneval_scenes"), not_before=started)


def collect(seconds: dict[str, float]) -> dict:
    """All results as one dictionary, also written to results.json."""
    from eval_tasks.reporting.results import read_results

    scores = read_results(WORKSPACE / "lmms_eval")
    reconstruction = json.loads((WORKSPACE / "reconstruction.json").read_text())
    results = {
        "reconstruction": {"psnr": reconstruction["psnr"]},
        "mmbench_scenes": scores["mmbench_scenes"],
        "geneval_scenes": scores["geneval_scenes"],
        "seconds": seconds,
    }
    (WORKSPACE / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    return results


def print_table(results: dict) -> None:
    bench, drawn = results["mmbench_scenes"], results["geneval_scenes"]
    print("\n| what | score | beside |")
    print("|---|---|---|")
    print(f"| reconstruction of held-out scenes, PSNR | {results['reconstruction']['psnr']:.2f} dB | |")
    print(f"| mmbench_scenes, accuracy | {bench['overall']:.3f} | chance {bench['chance']:.3f} |")
    print(f"| geneval_scenes, overall | {drawn['overall']:.3f} | shuffled prompts {drawn['baseline']:.3f} |")
    for skill in SKILLS:
        print(f"| - {skill} | {drawn[skill]:.3f} | |")
    total = sum(results["seconds"].values())
    stages = ", ".join(f"{name} {value:.0f}" for name, value in results["seconds"].items())
    print(f"\n{total:.0f} s in all: {stages}")
    print(f"results:         {WORKSPACE / 'results.json'}")
    print(f"reconstructions: {WORKSPACE / 'reconstruction.png'}")
    print(f"evolution:       {WORKSPACE / 'evolution' / 'evolution.png'}")
    print(f"drawn images:    {WORKSPACE / 'drawn.png'}")
    prompt = "a photo of a red circle above a blue square"
    print(f'\ntry: evotok-llava draw "{prompt}" -n 4 -o out/ --model {WORKSPACE / "finetune"}')


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fast", action="store_true", help="far fewer steps: shows that all works, learns little")
    fast = parser.parse_args().fast
    try:
        return run_all(fast)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run_all(fast: bool) -> int:
    quickstart = Quickstart(fast)
    quickstart.stage("prepare", lambda: prepare(fast))
    for name in ("pretrain", "finetune"):
        quickstart.stage(name, lambda name=name: train(name, fast))
    quickstart.stage("reconstruction", reconstruct)
    quickstart.stage("drawing", draw_skills)
    quickstart.stage("lmms_eval", lambda: evaluate(fast))
    seconds = {name: value for name, value in quickstart.seconds.items() if name != "prepare"}
    print_table(collect({**prepared_seconds(), **seconds}))
    quickstart.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
