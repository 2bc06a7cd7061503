"""Measure the peak memory of every stage of the quickstart, and of drawing, serving and encoding.

    python scripts/benchmark/memory.py --json memory.json                     # data and batches of the full quickstart
    python scripts/benchmark/memory.py --fast --stages scenes backbone        # those of quickstart.sh --fast
    python scripts/benchmark/memory.py --steps 12 --workspace outputs/memory

Every stage is the command that the quickstart runs, with few steps: the peak depends on the data and the batch, not on
the number of steps, which `--steps` shows. Two figures per stage: the largest resident set of a process, as the kernel
records it, and the largest sum over all processes at a time, in which memory that processes share counts once
(proportional set sizes, sampled every 0.2 s, so that a short peak can be missed). The exit code is 1 if a stage exceeds
`--limit`. Linux only.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from evotok_plugin.common import command_line
from evotok_plugin.common.command_parser import CommandParser
from evotok_plugin.errors import UserError

# This process stays small: a child's largest resident set includes that of its parent until it starts its program.
# `report`, which imports torch, is therefore imported after the last stage.

_INTERVAL = 0.2  # seconds
_REQUESTS = 4  # to the server, of each kind
PROMPT = "a photo of a red circle above a blue square"
INCLUDED = Path(__file__).resolve().parents[2] / "llava_ext" / "pretrained" / "scenes"


@dataclass(frozen=True)
class Peak:
    """Peak memory of a stage in bytes: of its largest process, and of all its processes together."""

    largest: int
    together: int


def tree(pid: int) -> Iterator[int]:
    """A process and its descendants."""
    yield pid
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return
    for child in children:
        yield from tree(int(child))


def proportional_bytes(pid: int) -> int:
    """The proportional set size of a process; 0 if it has ended."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    found = re.search(r"^Pss:\s+(\d+) kB", text, re.M)
    return int(found[1]) * 1024 if found else 0


def peak_of(
    command: list[str], folder: Path, log: Path, during: Callable[[subprocess.Popen, Path], None] | None = None
) -> Peak:
    """Run a command and measure it.

    Args:
        folder: its working directory.
        log: file for its output.
        during: runs beside the command, and ends it; the exit code is then ignored.

    Raises:
        UserError: the command fails.
    """
    together, failure = 0, []
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=subprocess.STDOUT)

    def work() -> None:
        try:
            assert during is not None
            during(process, log)
        except Exception as error:
            failure.append(error)
        finally:
            process.send_signal(signal.SIGTERM)

    thread = threading.Thread(target=work, daemon=True)
    if during is not None:
        thread.start()
    try:
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            together = max(together, sum(map(proportional_bytes, tree(process.pid))))
            time.sleep(_INTERVAL)
    except BaseException:
        process.terminate()
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    if failure or (during is None and process.returncode):
        lines = log.read_text(errors="replace").strip().splitlines()[-5:]
        reason = failure[0] if failure else f"exit code {process.returncode}"
        raise UserError(f"{' '.join(command)} failed ({reason}): {' / '.join(lines)}")
    return Peak(usage.ru_maxrss * 1024, max(together, usage.ru_maxrss * 1024))


# Stages ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """A stage: its command without the interpreter, and what runs beside it."""

    command: list[str]
    during: Callable[[subprocess.Popen, Path], None] | None = None


def ask_server(_: subprocess.Popen, log: Path) -> None:
    """Wait for the server's address in its log; then ask for images and answers about one of them."""
    ends = time.monotonic() + 120
    while not (found := re.search(r"http://\S+/v1", log.read_text(errors="replace"))):
        if time.monotonic() > ends:
            raise TimeoutError("the server did not start within 120 s")
        time.sleep(_INTERVAL)
    for number in range(_REQUESTS):
        body = {"model": "default", "prompt": PROMPT, "size": "auto", "seed": number}
        picture = post(f"{found[0]}/images/generations", body)["data"][0]["b64_json"]
        url = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}}
        content = [url, {"type": "text", "text": "Describe the image."}]
        messages = [{"role": "user", "content": content}]
        post(f"{found[0]}/chat/completions", {"model": "default", "messages": messages, "max_tokens": 32})


def post(address: str, body: dict) -> dict:
    """The answer to a JSON request."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(address, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


def stages(workspace: Path, options: argparse.Namespace) -> dict[str, Stage]:
    """All stages by name, in their order; later ones need the results of earlier ones."""
    scenes, steps = workspace / "scenes" / "train", ["--max_steps", options.steps]
    prepare = ["-m", "llava_ext.embedded.prepare", "--workspace", workspace, *(["--fast"] if options.fast else [])]
    evotok, llava = ["-m", "evotok_plugin.cli"], ["-m", "llava_ext.cli"]
    # The model that is evaluated: an untrained one would not stop its answers as a trained one does.
    evaluated = options.model
    commands: dict[str, list] = {
        "scenes": [*prepare, "--only", "scenes"],
        "backbone": [*prepare, "--only", "backbone"],
        "teacher": [
            *("-m", "evotok_plugin.training.teacher", "--data", scenes, "--tokenizer", workspace / "backbone"),
            *("--output_dir", workspace / "teacher", *steps),
        ],
        "tokenizer": [
            *(*evotok, "train", "--recipe", "tiny", "--data", scenes, "--teacher", workspace / "teacher"),
            *("--output_dir", workspace / "evotok", *steps),
        ],
        "stage 1": [*llava, "pretrain", "--workspace", workspace, *steps],
        "fine-tuning": [*llava, "finetune", "--workspace", workspace, *steps],
        "reinforcement": [*llava, "reinforce", "--workspace", workspace, *steps],
        "reconstruction": [
            *(*evotok, "evaluate", workspace / "scenes" / "val" / "images", "--model", workspace / "evotok"),
            *("-o", workspace / "reconstruction.json"),
        ],
        "lmms_eval": [
            *("-m", "lmms_eval", "--model", "evotok"),
            *("--model_args", f"pretrained={evaluated},images_dir={workspace / 'images'}"),
            *("--tasks", "mmbench_scenes,geneval_scenes", "--batch_size", 64, "--output_path", workspace / "lmms_eval"),
            *("--log_samples", "--limit", options.eval_limit),
        ],
        "draw": [*llava, "draw", PROMPT, "-n", 4, "-o", workspace / "drawn", "--model", evaluated],
        "serve": [*llava, "serve", "--port", 0, "--model", evaluated],
        "encode": [*evotok, "encode", scenes / "images", "-o", workspace / "cache", "--model", workspace / "evotok"],
    }
    return {
        name: Stage([str(word) for word in words], ask_server if name == "serve" else None)
        for name, words in commands.items()
    }


def run(options: argparse.Namespace) -> int:
    """Measure the stages and print the table.

    Raises:
        UserError: a number is too small, or a stage fails.
    """
    for name in ("steps", "eval_limit", "limit"):
        if getattr(options, name) <= 0:
            raise UserError(f"--{name} must be above 0, got {getattr(options, name)}")
    if not Path("/proc/self/smaps_rollup").is_file():
        raise UserError("/proc/PID/smaps_rollup is missing; run this benchmark on Linux")
    workspace = (options.workspace or Path(tempfile.mkdtemp(prefix="evotok-memory-"))).resolve()
    workspace.mkdir(parents=True, exist_ok=True)
    peaks: dict[str, Peak] = {}
    try:
        for name, stage in stages(workspace, options).items():
            if name in options.stages:
                log = workspace / f"{name.replace(' ', '_')}.log"
                peaks[name] = peak_of([sys.executable, *stage.command], Path.cwd(), log, stage.during)
                print(f"{name}: {gibibytes(peaks[name].largest)} GiB", file=sys.stderr, flush=True)
    except BaseException:
        if peaks:
            report(peaks, options)  # a run that fails or is stopped keeps what it has measured
        raise
    finally:
        if options.workspace is None:
            shutil.rmtree(workspace)
    return report(peaks, options)


def gibibytes(size: int) -> str:
    """A size in GiB."""
    return f"{size / 2**30:.2f}"


def report(peaks: dict[str, Peak], options: argparse.Namespace) -> int:
    """Print and write the table; 1 if a stage exceeds the limit."""
    from report import Table, machine, write_report

    rows = [[name, gibibytes(peak.largest), gibibytes(peak.together)] for name, peak in peaks.items()]
    table = Table(["stage", "largest process, GiB", "all processes, GiB"], rows)
    print(table.markdown())
    figures = {"bytes": {name: vars(peak) for name, peak in peaks.items()}, "steps": options.steps}
    name = "memory-fast" if options.fast else "memory"
    write_report(options.json, __file__, {name: table}, machine(packages=("torch", "transformers")), figures)
    above = [name for name, peak in peaks.items() if peak.together > options.limit * 2**30]
    if above:
        print(f"above {options.limit:g} GiB: {', '.join(above)}", file=sys.stderr)
    return int(bool(above))


STAGES = (
    "scenes", "backbone", "teacher", "tokenizer", "stage 1", "fine-tuning", "reinforcement", "reconstruction",
    "lmms_eval", "draw", "serve", "encode",
)  # fmt: skip


def main() -> int:
    """Parse the flags and measure."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, metavar="STAGE", help="stages to run")
    parser.add_argument("--fast", action="store_true", help="as many scenes as quickstart.sh --fast draws")
    parser.add_argument("--steps", type=int, default=3, help="steps of each training stage")
    parser.add_argument("--eval_limit", type=int, default=128, help="documents per task that lmms_eval reads")
    parser.add_argument("--limit", type=float, default=2.0, help="GiB that no stage may exceed")
    parser.add_argument("--model", default=str(INCLUDED), help="model that evaluates, draws and serves")
    parser.add_argument("--workspace", type=Path, help="folder for all results (default: a temporary one)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the figures and tables, for collect.py")
    return command_line.run(parser, work=run)


if __name__ == "__main__":
    sys.exit(main())
