"""Measure how long commands take until they show their help or draw an image, and the imports that they need.

    python scripts/benchmark/start_up.py --json start_up.json

Every command runs in a process of its own; the fastest round counts, so files are in the system's cache. `import torch`
and transformers' base class of models are the floor of a command that opens a model.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time

from report import Table, add_json_option, machine, write_report

from evotok_plugin.common import command_line
from evotok_plugin.common.command_parser import CommandParser
from evotok_plugin.errors import UserError

IMPORTS = {
    "Python": "pass",
    "`import torch`": "import torch",
    "`from transformers import PreTrainedModel`": "from transformers import PreTrainedModel",
}
PROGRAMS = {
    "evotok": "evotok_plugin.cli",
    "evotok-llava": "llava_ext.cli",
    "evotok-eval": "eval_tasks.cli",
}
COMMANDS = (
    "evotok --help",
    "evotok encode --help",
    "evotok-llava draw --help",
    "evotok-llava finetune --help",
    "evotok-eval run --help",
    "evotok-llava draw PROMPT",
)


def processes() -> dict[str, list[str]]:
    """The command lines by the names that the table shows."""
    found = {name: [sys.executable, "-c", code] for name, code in IMPORTS.items()}
    for command in COMMANDS:
        program, *words = command.split()
        words = ["a photo of a red circle" if word == "PROMPT" else word for word in words]
        found[f"`{command}`"] = [sys.executable, "-m", PROGRAMS[program], *words]
    return found


def seconds_of(command: list[str], folder: str, threads: int) -> tuple[float, float]:
    """Wall time and CPU time of a process.

    Raises:
        UserError: it fails.
    """
    before, started = os.times(), time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    wall, after = time.perf_counter() - started, os.times()
    if done.returncode:
        raise UserError(f"{' '.join(command)} ended with exit code {done.returncode}: {done.stderr}")
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    return wall, spent


def run(options: argparse.Namespace) -> None:
    """Measure and print the table.

    Raises:
        UserError: a number is too small, or a command fails.
    """
    for name in ("rounds", "threads"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(options, name)}")
    measured: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.rounds):
            for name, command in processes().items():
                measured.setdefault(name, []).append(seconds_of(command, folder, options.threads))
    best = {name: min(found) for name, found in measured.items()}
    rows = [[name, f"{wall:.2f}", f"{spent:.2f}"] for name, (wall, spent) in best.items()]
    shown = Table(["process", "s", "CPU s"], rows)
    on = machine(packages=("torch", "transformers")) | {"threads": str(options.threads)}
    print(shown.markdown())
    print(f"\n{', '.join(f'{key} {value}' for key, value in on.items())}")
    write_report(options.json, __file__, {"start-up": shown}, on, {"seconds": measured})


def main() -> int:
    """Parse the flags and measure."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="times that every process is measured")
    parser.add_argument("--threads", type=int, default=1, help="OMP_NUM_THREADS of the processes")
    add_json_option(parser)
    return command_line.run(parser, work=run)


if __name__ == "__main__":
    sys.exit(main())
