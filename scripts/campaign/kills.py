"""Stop training, encoding and drawing at random moments, resume, and check that nothing is lost.

    python scripts/campaign/kills.py                      # a few minutes on two cores
    python scripts/campaign/kills.py --kills 50 --kinds tokenizer stage

Every kind of command runs once uninterrupted. Then it is stopped at random moments (`kill -9`, and with `--signals`
also SIGINT, SIGTERM and SIGHUP) and resumed until it has had `--kills` stops and has reached its end. Checked are: work
that was finished before a stop is still there after it; the final result equals the uninterrupted one; no step is twice
in `metrics.jsonl`; no temporary file is left. The libraries are imported once, and every run is a fork. The table is
printed as Markdown; the exit code is 1 if anything was lost.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from evotok_plugin import cli as tokenizer_cli
from evotok_plugin.common import command_line
from evotok_plugin.common.command_parser import CommandParser
from evotok_plugin.data.code_cache import CodeCache
from evotok_plugin.data.images import open_picture
from evotok_plugin.errors import UserError
from evotok_plugin.scenes.corpus import write_corpus
from llava_ext import cli as llava_cli
from llava_ext.model_folder import default_model_folder, load_model
from llava_ext.training import train

_LIMIT_S = 600.0  # only ends a run that hangs
_NUM_IMAGES = 240


@dataclass(frozen=True)
class Kind:
    """A kind of command.

    Attributes:
        run: runs the command with its output in a folder; returns the exit code.
        finished: the finished work in a folder as a number that never decreases.
        result: the final result, to compare with that of an uninterrupted run.
    """

    run: Callable[[Path], int]
    finished: Callable[[Path], int]
    result: Callable[[Path], str]


@dataclass
class Outcome:
    """The figures of a kind."""

    stops: list[int] = field(default_factory=list)
    wrong_codes: int = 0
    lost: int = 0
    repeated_steps: int = 0
    leftovers: int = 0
    is_same: bool = True

    @property
    def is_good(self) -> bool:
        return self.is_same and not (self.wrong_codes or self.lost or self.repeated_steps or self.leftovers)


# The commands ----------------------------------------------------------------------------------------------------


def kinds(folder: Path) -> dict[str, Kind]:
    """The kinds of commands, on a small corpus that is written into a folder."""
    write_corpus(folder / "scenes", num_train=_NUM_IMAGES, num_val=0, seed=0)
    model, images = default_model_folder(), str(folder / "scenes" / "train" / "images")
    opened, processor = load_model(model)
    for part in (opened.vision_tower, processor.image_processor):
        part.save_pretrained(folder / "tower")

    def encode(out: Path) -> int:
        flags = ["--model", str(folder / "tower"), "--shard_size", "16", "--batch_size", "8", "--device", "cpu"]
        return tokenizer_cli.main(["encode", images, "-o", str(out), *flags])

    def draw(out: Path) -> int:
        prompts = ["a red ring!", "a red ring?", "a blue square", "two green rings"]
        return llava_cli.main(["draw", *prompts, "-n", "4", "-o", str(out), "--batch_size", "2"])

    def train_tokenizer(out: Path) -> int:
        flags = ["--semantic_weight", "0", "--max_steps", "16", "--save_every", "3", "--log_every", "1"]
        flags += ["--val_every", "8", "--batch_size", "8", "--kmeans_images", "64", "--num_workers", "1"]
        return tokenizer_cli.main(["train", "--recipe", "tiny", "--data", images, "--output_dir", str(out), *flags])

    def train_stage(out: Path) -> int:
        settings = {
            "model_name_or_path": model, "data_path": folder / "scenes" / "train" / "finetune.json",
            "image_folder": folder / "scenes" / "train", "code_cache": folder / "codes", "deepspeed": "none",
            "packing": "false", "max_steps": 12, "save_steps": 2, "logging_steps": 1, "report_to": "none",
            "per_device_train_batch_size": 2, "data_weights": "1", "output_dir": out,
        }  # fmt: skip
        return train.main(["--recipe", "finetune", *(str(p) for n, v in settings.items() for p in (f"--{n}", v))])

    return {
        "encode": Kind(encode, lambda out: len(list(out.glob("shard-*.json"))), _codes),
        "draw": Kind(draw, lambda out: len(_drawn(out)), lambda out: _hash(*sorted(_drawn(out).items()))),
        "tokenizer": Kind(train_tokenizer, _newest_checkpoint, _weights),
        "stage": Kind(train_stage, _newest_checkpoint, _weights),
    }


def _hash(*values: object) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()


def _codes(out: Path) -> str:
    cache = CodeCache(out)
    keys = sorted(path.name for path in (out.parent / "scenes" / "train" / "images").iterdir())
    return _hash(len(keys), [cache.codes(key).numpy().tobytes() for key in keys if key in cache])


def _drawn(out: Path) -> dict[str, str]:
    """The pixels of every complete drawing, by its file name."""
    found = {}
    for path in out.glob("*.png"):
        found[path.name] = hashlib.sha256(open_picture(path).tobytes()).hexdigest()
    return found


def _newest_checkpoint(out: Path) -> int:
    """The newest step from which a run could be resumed."""
    steps = [int(path.parent.name.split("-")[1]) for path in out.glob("checkpoint-*/COMPLETE.json")]
    for path in out.glob("checkpoint-*.safetensors"):
        try:
            load_file(path)
        except SafetensorError:
            continue
        steps.append(int(path.stem.split("-")[1]))
    return max(steps, default=0)


def _weights(out: Path) -> str:
    weights = load_file(out / "model.safetensors")
    return _hash([(name, weights[name].float().numpy().tobytes()) for name in sorted(weights)])


def _repeated_steps(out: Path) -> int:
    """Steps whose training losses are more than once in the metrics file."""
    path = out / "metrics.jsonl"
    if not path.is_file():
        return 0
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    steps = [entry["step"] for entry in entries if "loss" in entry]
    return len(steps) - len(set(steps))


# The campaign ----------------------------------------------------------------------------------------------------


def _child(run: Callable[[Path], int], out: Path) -> None:
    os.setpgid(0, 0)  # a stop reaches the data-loading processes too
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    null = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(null, descriptor)
    torch.set_num_threads(1)
    os._exit(run(out))


def run_once(run: Callable[[Path], int], out: Path, stop_after: float | None = None, number: int = 0) -> int | None:
    """Run a command in a fork, and stop it after some seconds; returns its exit code, None if it hung."""
    child = multiprocessing.get_context("fork").Process(target=_child, args=(run, out))
    child.start()
    child.join(_LIMIT_S if stop_after is None else stop_after)
    if child.exitcode is None and child.pid is not None:
        os.killpg(child.pid, number if stop_after is not None else signal.SIGKILL)
        child.join(_LIMIT_S)
    return child.exitcode


def campaign(kind: Kind, folder: Path, name: str, num_stops: int, signals: list[int], rng: random.Random) -> Outcome:
    """Stop a command `num_stops` times, and run it to its end; a run that ends by itself is followed by a new one."""
    outcome, reference = Outcome(), folder / f"{name}_uninterrupted"
    started = time.monotonic()
    if code := run_once(kind.run, reference):
        raise UserError(f"{name}: the uninterrupted run ended with exit code {code}")
    seconds = time.monotonic() - started
    for number_of_run in count():
        out, done, code = folder / f"{name}_{number_of_run}", 0, None
        while code != 0:
            number = rng.choice(signals) if len(outcome.stops) < num_stops else 0
            started = time.monotonic()
            code = run_once(kind.run, out, rng.uniform(0.02, 0.9) * seconds if number else None, number)
            if code == 0:
                seconds = min(seconds, time.monotonic() - started)
            elif number:
                outcome.stops.append(number)
                outcome.wrong_codes += code not in (-number, 128 + number)
            else:
                raise UserError(f"{name}: the resumed run ended with exit code {code}")
            now = kind.finished(out) if out.exists() else 0
            outcome.lost, done = outcome.lost + (now < done), max(now, done)
        outcome.is_same = outcome.is_same and kind.result(out) == kind.result(reference)
        outcome.repeated_steps += _repeated_steps(out)
        outcome.leftovers += len([path for path in out.rglob("*") if path.name.endswith(".part")])
        if len(outcome.stops) >= num_stops:
            break
    return outcome


def as_table(outcomes: dict[str, Outcome]) -> str:
    """The table of all kinds in Markdown."""
    lines = [
        "| command | stops | wrong exit codes | lost | steps twice | leftovers | result |",
        "|---|--:|--:|--:|--:|--:|---|",
    ]
    for name, one in outcomes.items():
        by_signal = [f"{one.stops.count(n)} {signal.Signals(n).name}" for n in sorted(set(one.stops))]
        result = "the same" if one.is_same else "DIFFERENT"
        figures = f"{one.wrong_codes} | {one.lost} | {one.repeated_steps} | {one.leftovers}"
        lines.append(f"| {name} | {', '.join(by_signal)} | {figures} | {result} |")
    return "\n".join(lines)


def main(arguments: argparse.Namespace) -> int:
    rng, outcomes = random.Random(arguments.seed), {}
    signals = [signal.Signals[f"SIG{name}"].value for name in arguments.signals]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        found = kinds(Path(folder))
        for name in arguments.kinds:
            outcomes[name] = campaign(found[name], Path(folder), name, arguments.kills, signals, rng)
            print(f"{name}: {outcomes[name]}", file=sys.stderr)
    print(as_table(outcomes))
    return 0 if all(outcome.is_good for outcome in outcomes.values()) else 1


if __name__ == "__main__":
    parser = CommandParser(description=__doc__)
    names = ["encode", "draw", "tokenizer", "stage"]
    parser.add_argument("--kinds", nargs="+", default=names, choices=names, help="commands to stop")
    parser.add_argument("--kills", type=int, default=8, help="stops of each command")
    parser.add_argument(
        "--signals",
        nargs="+",
        default=["KILL"],
        choices=["KILL", "INT", "TERM", "HUP"],
        help="signals that stop a command",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments of the stops")
    parser.add_argument("--folder", help="for temporary files (default: the system's)")
    sys.exit(command_line.run(parser, work=main))
