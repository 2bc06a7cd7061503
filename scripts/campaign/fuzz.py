"""Damage every kind of file that the commands read, and count how the commands end.

Each case copies a whole input, damages one file with a seeded mutation (`mutations.py`), and reads the input in a child
process with a limit of time and memory. It passes if the command accepts the input (exit code 0) or ends with exit code
2 and one line of error that names the file or its folder. Examples, from the root of the checkout:

    python scripts/campaign/fuzz.py                                  # 40 cases of each kind
    python scripts/campaign/fuzz.py --count 1000 --kinds image tar   # a long run of two kinds
    python scripts/campaign/fuzz.py --kinds image --case 17 --keep DIR   # one case again, with its traceback
"""

import io
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from inputs import INPUTS, Input
from mutations import mutations_of

from evotok_plugin.common.command_parser import CommandParser
from evotok_plugin.errors import UserError

GOOD = ("accepted", "one line")
OUTCOMES = (*GOOD, "traceback", "unclear", "hang", "memory")
_MEMORY = 2 << 30  # bytes that a case may allocate on top of what the process has


@dataclass(frozen=True)
class Case:
    """The end of one case: an outcome, and the error or traceback."""

    kind: str
    number: int
    damage: str
    outcome: str
    detail: str


def run_case(given: Input, whole: Path, number: int, seed: int, limit: float, folder: Path) -> Case:
    """Damage one file of a copy of the input, and read the input.

    Args:
        whole: folder of the undamaged input.
        limit: seconds.
        folder: where the copy is made; it must not exist.
    """
    rng = np.random.default_rng([seed, number, *given.name.encode()])
    shutil.copytree(whole, folder)
    files = [path for pattern in given.damaged for path in sorted((folder / "input").glob(pattern)) if path.is_file()]
    path = files[int(rng.integers(len(files)))]
    choice = mutations_of(path)
    mutate = choice[int(rng.integers(len(choice)))]
    damage = f"{mutate.__name__} {path.relative_to(folder / 'input')}"
    mutate(path, rng)
    outcome, detail = _in_child(lambda: given.read(folder), limit, folder, (path.stem, path.parent.name, *given.words))
    return Case(given.name, number, damage, outcome, detail)


def _in_child(read: Callable[[], object], limit: float, folder: Path, names: Sequence[str] = ()) -> tuple[str, str]:
    """The outcome of reading in a child process, which a crash or a limit ends without harm."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reader)
        try:
            report = json.dumps(_outcome(read, folder, names))
        except BaseException:
            report = json.dumps(("traceback", traceback.format_exc()))
        with os.fdopen(writer, "w") as pipe:
            pipe.write(report)
        os._exit(0)
    os.close(writer)
    end = time.monotonic() + limit
    content = b""
    os.set_blocking(reader, False)
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        try:
            content += os.read(reader, 1 << 16)
        except BlockingIOError:
            pass
        if done:
            break
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(reader)
            return "hang", f"no end after {limit:g} s"
        time.sleep(0.005)
    while part := os.read(reader, 1 << 16):
        content += part
    os.close(reader)
    if not content:
        return "traceback", f"the process died of signal {status & 0x7F}"
    outcome, detail = json.loads(content)
    return outcome, detail


def _outcome(read: Callable[[], object], folder: Path, names: Sequence[str]) -> tuple[str, str]:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY, used + _MEMORY))
    errors = io.StringIO()
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    try:
        with redirect_stderr(errors), redirect_stdout(io.StringIO()):
            code = read() or 0
    except UserError as error:
        code, lines = 2, [f"error: {error}"]
    except SystemExit as error:
        code, lines = int(error.code or 0), errors.getvalue().strip().split("\n")
    except BaseException as error:
        memory = isinstance(error, MemoryError) or "allocate memory" in str(error)
        return "memory" if memory else "traceback", traceback.format_exc()
    else:
        lines = errors.getvalue().strip().split("\n")
    text = "\n".join(lines)
    if code == 0:
        return "accepted", text
    told = [line for line in lines if line.startswith("error: ")]
    is_clear = code == 2 and lines[-1:] == told and any(name in told[0] for name in names)
    return "one line" if is_clear else "unclear", f"exit code {code}: {text}"


@contextmanager
def _scratch(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        keep.mkdir(parents=True)
        yield keep
        return
    with tempfile.TemporaryDirectory(prefix="evotok-fuzz-") as folder:
        yield Path(folder)


def fuzz(
    given: Input, numbers: Sequence[int], seed: int = 0, limit: float = 60.0, keep: Path | None = None
) -> Iterator[Case]:
    """Run the numbered cases of a kind of input; the first case is the undamaged input, which must be accepted.

    Args:
        limit: seconds of each case.
        keep: a new folder where the damaged inputs stay; by default they are removed.
    """
    with _scratch(keep) as folder:
        whole = folder / "whole"
        (whole / "input").mkdir(parents=True)

        def write() -> None:  # without a result, which would be an exit code
            given.write(whole)

        outcome, detail = _in_child(write, 10 * limit, whole)
        if outcome != "accepted":
            raise RuntimeError(f"{given.name} cannot be written: {detail}")
        shutil.copytree(whole, folder / "undamaged")
        outcome, detail = _in_child(lambda: given.read(folder / "undamaged"), limit, folder / "undamaged")
        if outcome != "accepted":
            raise RuntimeError(f"the undamaged {given.name} is not accepted: {detail}")
        for number in numbers:
            copy = folder / f"case{number}"
            yield run_case(given, whole, number, seed, limit, copy)
            if keep is None:
                shutil.rmtree(copy)


def table(cases: Sequence[Case]) -> str:
    """The number of cases by kind and outcome, as Markdown."""
    rows = [f"| input | cases | {' | '.join(OUTCOMES)} |", "| --- |" + " ---: |" * (1 + len(OUTCOMES))]
    kinds = dict.fromkeys(case.kind for case in cases)
    for name, several in [(kind, [case for case in cases if case.kind == kind]) for kind in kinds] + [("all", cases)]:
        counts = Counter(case.outcome for case in several)
        rows.append(f"| {name} | {len(several)} | {' | '.join(str(counts[outcome]) for outcome in OUTCOMES)} |")
    return "\n".join(rows)


def main() -> int:
    parser = CommandParser(description=__doc__)
    parser.add_argument(
        "--kinds",
        nargs="+",
        choices=list(INPUTS),
        default=list(INPUTS),
        metavar="KIND",
        help=f"kinds of inputs: {', '.join(INPUTS)} (default: all)",
    )
    parser.add_argument("--count", type=int, default=40, help="cases of each kind")
    parser.add_argument("--seed", type=int, default=0, help="seed of the damage")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds of each case")
    parser.add_argument("--case", type=int, help="run only the case with this number (default: all)")
    parser.add_argument("--all", action="store_true", help="print the error of every case, not only of failures")
    parser.add_argument("--keep", type=Path, help="new folder where the damaged inputs stay")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    numbers = range(arguments.count) if arguments.case is None else [arguments.case]
    cases = []
    for kind in arguments.kinds:
        keep = None if arguments.keep is None else arguments.keep / kind
        for case in fuzz(INPUTS[kind], numbers, arguments.seed, arguments.limit, keep):
            cases.append(case)
            if case.outcome not in GOOD:
                print(f"{case.kind} {case.number}: {case.damage}: {case.outcome}\n{case.detail}\n", file=sys.stderr)
            elif arguments.case is not None or arguments.all:
                print(f"{case.kind} {case.number}: {case.damage}: {case.outcome}\n{case.detail}\n", file=sys.stderr)
    print(table(cases))
    return 0 if all(case.outcome in GOOD for case in cases) else 1


if __name__ == "__main__":
    sys.exit(main())
