"""Run the quickstart with several seeds, and summarize all figures of their results.

    python scripts/benchmark/quickstart_seeds.py --seeds 0 1 2 3 4 --jobs 2 --threads 1 -o outputs/seeds

Every seed has its own folder, `OUTPUT/seed_N`, and its log, `OUTPUT/seed_N.log`. Rerun the command to resume: finished
seeds are only read. The printed table has the mean, the standard deviation (of the sample) and the range of every
figure; those for the documentation have the metrics of the tasks, and the held-out reward over the steps of
reinforcement.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from report import Table, add_json_option, machine, write_report

from evotok_plugin.common.command_parser import CommandParser
from evotok_plugin.scenes.scene import SKILLS

REPOSITORY = Path(__file__).resolve().parents[2]
# By task: the title of its overall score, the figure in it, and the parts of the score.
TASKS = {
    "mmbench_scenes": (
        "`mmbench_scenes`, accuracy (chance {:.3f})", "chance",
        ("color", "shape", "counting", "existence", "location", "relation"),
    ),
    "geneval_scenes": ("`geneval_scenes`, overall (shuffled prompts {:.2f})", "baseline", SKILLS),
}  # fmt: skip


def is_finished(workspace: Path, fast: bool) -> bool:
    """Whether a folder has the results of a finished quickstart of this kind."""
    try:
        state = json.loads((workspace / "run.json").read_text())
    except (OSError, ValueError):
        return False
    return bool(state.get("finished")) and state.get("fast") == fast and (workspace / "results.json").is_file()


def run_seed(seed: int, options: argparse.Namespace) -> int:
    """Run or resume the quickstart with one seed; returns its exit code."""
    workspace = options.output.resolve() / f"seed_{seed}"
    if is_finished(workspace, options.fast):
        return 0
    command = [
        "bash",
        str(REPOSITORY / "scripts" / "quickstart.sh"),
        "--seed",
        str(seed),
        "--workspace",
        str(workspace),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    print(f"seed {seed} -> {workspace}", file=sys.stderr, flush=True)
    with workspace.with_suffix(".log").open("a") as log:
        flags = ["--fast"] if options.fast else []
        return subprocess.run([*command, *flags], stdout=log, stderr=subprocess.STDOUT, env=environment).returncode


def figures(results: dict, prefix: str = "") -> dict[str, float]:
    """All numbers of nested results, by their paths: "geneval_scenes/overall"."""
    found: dict[str, float] = {}
    for name, value in results.items():
        if isinstance(value, dict):
            found |= figures(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{prefix}{name}"] = float(value)
    return found


def summary(runs: list[dict[str, float]]) -> list[list[str]]:
    """One row per figure: name, number of runs, mean, standard deviation, least and largest value."""
    rows = []
    for name in dict.fromkeys(name for run in runs for name in run):
        values = np.array([run[name] for run in runs if name in run])
        deviation = f"{values.std(ddof=1):.3f}" if len(values) > 1 else "-"
        least, largest = f"{values.min():.3f}", f"{values.max():.3f}"
        rows.append([name, str(len(values)), f"{values.mean():.3f}", deviation, least, largest])
    return rows


def metrics(runs: list[dict[str, float]]) -> Table:
    """The metrics of the tasks and of the reconstructions, those that all runs have."""

    def values(name: str) -> list[float]:
        return [run[name] for run in runs if name in run]

    named = {}
    for task, (title, reference, parts) in TASKS.items():
        if level := values(f"{task}/{reference}"):
            named[f"{task}/overall"] = (title.format(np.mean(level)), 3)
        named |= {f"{task}/{part}": (f"- {part}", 3) for part in parts}
    named["reconstruction/psnr"] = ("PSNR of reconstructions, dB", 2)
    rows = []
    for name, (title, digits) in named.items():
        if len(found := values(name)) == len(runs):
            spread = f" ± {np.std(found, ddof=1):.{digits}f}" if len(runs) > 1 else ""
            least, largest = f"{min(found):.{digits}f}", f"{max(found):.{digits}f}"
            rows.append([title, f"{np.mean(found):.{digits}f}{spread}", f"{least} to {largest}"])
    return Table(["metric", "mean ± sd", "range"], rows)


def heldout_rewards(log: Path) -> dict[int, float]:
    """The held-out reward in the `metrics.jsonl` of a reinforcement, by step; empty without the file."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    return {row["step"]: row["heldout/reward"] for row in map(json.loads, lines) if "heldout/reward" in row}


def heldout_table(rewards: dict[int, dict[int, float]]) -> Table:
    """Seeds as rows, steps of reinforcement as columns."""
    steps = sorted({step for one in rewards.values() for step in one})
    rows = [
        [f"seed {seed}", *(f"{one[step]:.3f}" if step in one else "" for step in steps)]
        for seed, one in rewards.items()
    ]
    return Table(["step", *map(str, steps)], rows)


def main() -> int:
    """Run all seeds and print the table; the exit code is 1 if a run failed."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="seeds of the runs")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--threads", type=int, default=1, help="OMP_NUM_THREADS of each run")
    parser.add_argument("--fast", action="store_true", help="the quickstart's --fast, to try this script")
    parser.add_argument("-o", "--output", type=Path, default=Path("outputs/seeds"), help="folder for all runs")
    add_json_option(parser)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        codes = list(pool.map(lambda seed: run_seed(seed, options), options.seeds))
    done = [seed for seed, code in zip(options.seeds, codes, strict=True) if code == 0]
    for seed, code in zip(options.seeds, codes, strict=True):
        if code:
            print(
                f"seed {seed} ended with exit code {code}; see {options.output / f'seed_{seed}.log'}", file=sys.stderr
            )
    runs = [figures(json.loads((options.output / f"seed_{seed}" / "results.json").read_text())) for seed in done]
    if runs:
        print(f"seeds {', '.join(map(str, done))}; {options.jobs} at the same time, {options.threads} threads each\n")
        table = Table(["figure", "runs", "mean", "sd", "min", "max"], summary(runs))
        print(table.markdown())
        packages = ("torch", "transformers", "deepspeed", "lmms_eval")
        on = machine(packages=packages) | {"threads": str(options.threads)}
        rewards = {seed: heldout_rewards(options.output / f"seed_{seed}/reinforce/metrics.jsonl") for seed in done}
        tables = {"quickstart": metrics(runs), "quickstart-heldout": heldout_table(rewards)}
        write_report(options.json, __file__, tables, on, {"runs": dict(zip(done, runs, strict=True))})
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
