"""Test and measure on one GPU what needs a GPU, in at most 9 minutes, without a network connection or installation.

    python scripts/gpu/check.py OUT          # as `bash scripts/gpu/check.sh OUT`
    python scripts/gpu/check.py OUT --cpu    # only the parts that need no GPU, at small sizes

Every part is a process with a time limit. After each part its results are in OUT/PART.json and its output in
OUT/PART.log, and its measurements are appended to OUT/rows.md, so a part that fails or is stopped loses no earlier
results. OUT/summary.json lists the parts that passed, failed or were not run. The exit code is 1 if a part failed.
Without a GPU the check runs as with `--cpu`.

This program uses Python's standard library only: a part whose packages are missing is skipped, and they are named.
"""

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
GPU, BENCHMARK = REPOSITORY / "scripts" / "gpu", REPOSITORY / "scripts" / "benchmark"
SECONDS = 535  # of all parts together
PATIENCE = 5  # factor of all time limits without a GPU, where nothing is lost by waiting
MODELS = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "PIL", "yaml", "tqdm", "jinja2")
HEADER = "| part | measurement | result | device | torch | date |\n|---|---|---|---|---|---|\n"

Rows = list[tuple[str, str]]


@dataclass(frozen=True)
class Part:
    """A process of the check.

    Attributes:
        seconds: time limit.
        gpu: command on a GPU; "{json}" is the file for its results.
        cpu: command without a GPU; None if the part needs one.
        packages: modules that it imports.
        rows: measurements and results for the table.
        wrong: the reason why the results mean failure, or "".
        environment: additional environment variables without a GPU.
    """

    name: str
    seconds: int
    gpu: list[str]
    cpu: list[str] | None
    packages: tuple[str, ...]
    rows: Callable[[Any], Rows]
    wrong: Callable[[Any], str] = lambda result: ""
    environment: dict[str, str] = field(default_factory=dict)


# The parts -------------------------------------------------------------------------------------------------------


def parts(missing: list[str], has_gpu: bool = True) -> list[Part]:
    """All parts but the first in their order; `missing` are the modules that the machine lacks."""
    without_lpips = ["--set", "lpips_weight=0"] if "lpips" in missing else []
    small_search = "--images 1 --positions 16 --levels 2 --codebook_size 256 --rounds 1 --peer_rounds 0".split()
    small_images = "--head tiny --backbone small --batch 1 --positions 1 --rounds 1".split()
    on_gpu = "--device cuda --dtype bfloat16 --batch 1 16 --positions 32 --rounds 1".split()
    drawing = [str(BENCHMARK / "generation.py"), "--json", "{json}"]
    quantizer = [str(BENCHMARK / "quantizer.py"), "--json", "{json}"]
    steps = [str(BENCHMARK / "tokenizer_step.py"), "--json", "{json}"]
    training = [str(BENCHMARK / "train_throughput.py"), "--json", "{json}"]
    kernel, graphs = ([str(GPU / name), "--json", "{json}"] for name in ("search_kernel.py", "graphs.py"))
    resources = [str(GPU / "kernel_resources.py"), "--json", "{json}"]
    return [
        Part("gpu_tests", 80, tests_command(), None, (*MODELS, "pytest"), test_rows, wrong_tests),
        Part(
            "search_kernel", 80, [*kernel, "--device", "cuda"], [*kernel, "--device", "cpu"], ("torch", "triton"),
            search_rows, wrong_codes, {"TRITON_INTERPRET": "1"},
        ),
        Part(
            "graphs", 40, [*graphs, "--device", "cuda"], [*graphs, "--positions", "2"], MODELS, graph_rows, wrong_draws
        ),
        Part("kernel_resources", 35, resources, resources, ("torch", "triton"), resource_rows),
        Part(
            "quantizer", 35, [*quantizer, *"--device cuda --images 1 8 64 --peer_rounds 0".split()],
            [*quantizer, *small_search], ("torch",), quantizer_rows, wrong_search,
        ),
        Part(
            "drawing", 60, [*drawing, *on_gpu, "--use_graphs"], [*drawing, *small_images, "--use_graphs"], MODELS,
            drawing_rows,
        ),
        Part(
            "drawing_without_graphs", 50, [*drawing, *on_gpu, "--no-use_graphs"],
            [*drawing, *small_images, "--no-use_graphs"], MODELS, drawing_rows,
        ),
        Part(
            "tokenizer_step", 75, [*steps, *"--recipes base paper --batch_size 32".split(), *without_lpips],
            [*steps, *"--recipes tiny --batch_size 2 --steps 1".split()], MODELS,
            partial(step_rows, note=", without LPIPS" if has_gpu and without_lpips else ""),
            partial(unmeasured, count=2 if has_gpu else 1),
        ),
        Part(
            "train_throughput", 55, [*training, *"--device cuda --samples 32 --rounds 2".split()],
            [*training, *"--sizes tiny --samples 4 --rounds 1".split()], (*MODELS, "peft", "accelerate"),
            training_rows,
        ),
    ]  # fmt: skip


def tests_command() -> list[str]:
    """pytest on the files with tests that need a GPU."""
    files = [
        str(path)
        for path in sorted((REPOSITORY / "tests").rglob("test_*.py"))
        if "pytest.mark.gpu\n" in path.read_text(encoding="utf-8")
    ]
    options = "-m gpu -v -p no:cacheprovider --import-mode=importlib -o addopts= --junitxml={json}".split()
    return ["-m", "pytest", *options, *files]


def test_rows(result: dict) -> Rows:
    """One row: the numbers of tests."""
    outcomes = [test["outcome"] for test in result["tests"]]
    counts = ", ".join(f"{outcomes.count(name)} {name}" for name in ("passed", "failed", "skipped") if name in outcomes)
    return [("tests marked `gpu`", counts or "none found")]


def wrong_tests(result: dict) -> str:
    """The tests that did not pass."""
    other = [test["name"] for test in result["tests"] if test["outcome"] == "failed"]
    if not any(test["outcome"] == "passed" for test in result["tests"]):
        return "no test passed"
    return f"failed: {', '.join(other)}" if other else ""


def search_rows(result: dict) -> Rows:
    """Exactness per case, and times per number of images and per launch configuration."""
    rows = [
        (f"search, {case['search']}, {case['case']}", f"{case['wrong']} of {case['codes']} codes unlike float64")
        for case in result["exactness"]
    ]
    for one in result["times"]:
        speed = f"{one['milliseconds']} ms, {one['teraflop_per_second']} TFLOP/s"
        rows.append((f"search, {one['search']}, {one['images']} images x 256", speed))
    return rows


def wrong_codes(result: dict) -> str:
    """The cases with a code that is not the nearest."""
    wrong = [f"{case['search']}, {case['case']}" for case in result["exactness"] if case["wrong"]]
    wrong += [one["search"] for one in result["times"] if not one["same_codes"]]
    return f"codes are not the nearest: {'; '.join(wrong)}" if wrong else ""


def graph_rows(result: dict) -> Rows:
    """Whether recorded steps draw the same codes, per setting."""
    same = {True: "same codes", False: "other codes"}
    return [(f"recorded steps, {one['options']}", same[one["first_difference"] is None]) for one in result["cases"]]


def wrong_draws(result: dict) -> str:
    """The settings in which recorded steps draw other codes."""
    wrong = [
        f"{one['options']} from position {one['first_difference']}"
        for one in result["cases"]
        if one["first_difference"] is not None
    ]
    return f"recorded steps draw other codes: {'; '.join(wrong)}" if wrong else ""


def resource_rows(report: dict) -> Rows:
    """Registers, shared memory and spills per configuration."""
    return [
        (
            f"sm_{one['capability']}, {one['precision']}, {one['block_m']} x {one['block_k']}, {one['warps']} warps",
            f"{one['registers']} registers, {one['shared_kibibytes']:g} KiB shared memory, "
            f"{one['spilled_bytes']} bytes spilled",
        )
        for one in report["results"]
    ]


def quantizer_rows(report: dict) -> Rows:
    """Time and memory of every contestant per number of images."""
    return [
        (
            f"{name}, {result['images']} images",
            f"{row['milliseconds']} ms ({row['times_floor']} x floor), {row['peak_mebibytes']} MiB",
        )
        for result in report["results"]
        for name, row in result["contestants"].items()
    ]


def wrong_search(report: dict) -> str:
    """The batches with codes unlike a float64 search."""
    wrong = [str(result["images"]) for result in report["results"] if result["codes_unlike_float64"]]
    return f"codes unlike a float64 search with {', '.join(wrong)} images" if wrong else ""


def drawing_rows(report: dict) -> Rows:
    """Time per position and images per second of both implementations per batch size."""
    sizes = report["sizes"]
    return [
        (
            f"{name}, {sizes['image head']} head, {sizes['backbone']} LLM, {sizes['dtype']}, batch {result['batch']}",
            f"{row['milliseconds_a_position']} ms per position, {row['images_per_second']} images/s",
        )
        for result in report["results"]
        for name, row in result["contestants"].items()
    ]


def step_rows(report: dict, note: str) -> Rows:
    """Time and memory of a training step per recipe."""
    return [
        (
            f"step, {row['recipe']} ({row['dtype']}), batch {row['batch_size']}{note}",
            f"{row['seconds_a_step']} s, {row['images_per_second']} images/s, {row['times_floor']} x floor, "
            f"{row['peak_gibibytes']} GiB",
        )
        for row in report["rows"]
    ]


def unmeasured(report: dict, count: int) -> str:
    """The number of recipes without results."""
    found = len(report["rows"])
    return "" if found == count else f"{count - found} of {count} recipes failed"


def training_rows(report: dict) -> Rows:
    """Throughput and memory of every contestant."""
    return [
        (
            f"{name}, LLM {report['sizes']['width']} wide",
            f"{row['samples_per_second']} samples/s ({row['times_floor']} x floor), {row['peak_mebibytes']} MiB",
        )
        for name, row in report["contestants"].items()
    ]


# Running them ----------------------------------------------------------------------------------------------------


class Check:
    """A run: its folder, its deadline, and what it knows about the machine."""

    def __init__(self, out: Path, seconds: float) -> None:
        self.out, self.deadline = out, time.monotonic() + seconds
        self.date = datetime.datetime.now(datetime.UTC).date().isoformat()
        self.device = self.torch = "unknown"
        self.states: list[dict[str, Any]] = []
        self.patience = 1
        (out / "rows.md").write_text(HEADER, encoding="utf-8")

    def run(self, name: str, command: list[str], seconds: float, environment: dict[str, str]) -> tuple[Any, str, float]:
        """Run a process; returns its results (None without any), the reason of its failure, and its seconds."""
        seconds = min(seconds, self.deadline - time.monotonic())
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as work, (self.out / f"{name}.log").open("wb") as log:
            file = Path(work) / "result"
            words = [sys.executable, *(word.replace("{json}", str(file)) for word in command)]
            process = subprocess.Popen(
                words, cwd=REPOSITORY, env=variables(environment), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
            try:
                code = process.wait(max(seconds, 1))
                reason = f"exit code {code}, see {name}.log" if code else ""
            except subprocess.TimeoutExpired:
                reason = f"stopped after its time limit of {seconds:.0f} s"
            finally:
                end(process)
            result = read_result(file)
        if not reason and result is None:
            reason = f"no results, see {name}.log"
        return result, reason, time.monotonic() - started

    def part(self, part: Part, has_gpu: bool, missing: list[str]) -> None:
        """Run a part if it can run, and record it."""
        command = part.gpu if has_gpu else part.cpu
        lacking = [name for name in part.packages if name in missing]
        if command is None:
            return self.record(part.name, "skipped", "needs a GPU")
        if lacking:
            return self.record(part.name, "skipped", f"missing packages: {', '.join(lacking)}")
        if self.deadline - time.monotonic() < 5:
            return self.record(part.name, "skipped", "no time left")
        seconds = part.seconds * self.patience
        print(f"{part.name}: at most {seconds} s", flush=True)
        result, reason, spent = self.run(part.name, command, seconds, {} if has_gpu else part.environment)
        rows: Rows = []
        if result is not None:
            try:
                rows = part.rows(result)
                reason = part.wrong(result) or reason
            except (KeyError, TypeError, IndexError) as error:
                reason = reason or f"incomplete results: {error!r}"
        self.record(part.name, "failed" if reason else "passed", reason, spent, rows, result, command)

    def record(
        self, name: str, status: str, reason: str, seconds: float = 0.0, rows: Rows = (), result: Any = None,
        command: list[str] = (),
    ) -> None:  # fmt: skip
        """Write the files of a part, append its rows, and rewrite the summary."""
        state = {"part": name, "status": status, "reason": reason, "seconds": round(seconds, 1)}
        self.states.append(state)
        machine = {"device": self.device, "torch": self.torch, "date": self.date}
        words = ["python", *(word.replace(f"{REPOSITORY}/", "").replace("{json}", "FILE") for word in command)]
        contents = {**state, **machine, "command": " ".join(words) if command else "", "result": result}
        write_json(self.out / f"{name}.json", {**contents, "rows": [list(row) for row in rows]})
        with (self.out / "rows.md").open("a", encoding="utf-8") as file:
            for what, measured in rows:
                note = "" if status == "passed" else f" ({status}: {reason})"
                words = [name, what, measured + note, *machine.values()]
                file.write(f"| {' | '.join(word.replace('|', '/') for word in words)} |\n")
        write_json(self.out / "summary.json", {**machine, "parts": self.states})


def variables(more: dict[str, str]) -> dict[str, str]:
    """The environment of a part: this checkout first, and no connections."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    fixed = {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**kept, **fixed, "PYTHONUNBUFFERED": "1", **more}


def end(process: subprocess.Popen) -> None:
    """Kill a process and its children, which share its process group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def read_result(file: Path) -> Any:
    """The results of a part: JSON, or the XML of pytest; None if there are none."""
    try:
        text = file.read_text(encoding="utf-8")
        return read_tests(text) if text.startswith("<") else json.loads(text)
    except (OSError, ValueError, xml.etree.ElementTree.ParseError):
        return None


def read_tests(text: str) -> dict:
    """Name, outcome and seconds of every test in the XML of pytest."""
    tests = []
    for case in xml.etree.ElementTree.fromstring(text).iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        tests.append({"name": case.get("name"), "outcome": outcome, "seconds": float(case.get("time") or 0)})
    return {"tests": tests}


def write_json(file: Path, contents: Any) -> None:
    """Write a file in one step."""
    part = file.with_suffix(".part")
    part.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
    part.replace(file)


def main() -> int:
    """Run all parts; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the results, new or empty")
    parser.add_argument("--cpu", action="store_true", help="only the parts that need no GPU, at small sizes")
    parser.add_argument("--seconds", type=int, help="time limit of all parts (default: 535, without a GPU 2675)")
    parser.add_argument("--parts", nargs="+", metavar="PART", help="only these parts (default: all)")
    options = parser.parse_args()
    known = [part.name for part in parts([])]
    if unknown := sorted({*(options.parts or [])} - {*known}):
        parser.error(f"unknown parts: {', '.join(unknown)}; choose from {', '.join(known)}")
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        parser.error(f"{options.out} exists and is not an empty folder; choose another OUT")
    options.out.mkdir(parents=True, exist_ok=True)
    check = Check(options.out, options.seconds or SECONDS)

    machine, reason, spent = check.run("machine", [str(GPU / "machine.py"), "--json", "{json}"], 25, {})
    machine = machine or {"missing": [], "gpu": None, "cpu": "unknown", "torch": "unknown"}
    has_gpu, missing = bool(machine["gpu"]) and not options.cpu, machine["missing"]
    check.device, check.torch = machine["gpu"] if has_gpu else machine["cpu"], machine["torch"] or "missing"
    check.record("machine", "failed" if reason else "passed", reason, spent, result=machine)
    print(f"{check.device}, torch {check.torch}; missing packages: {', '.join(missing) or 'none'}")
    if not has_gpu:
        check.patience = PATIENCE
        check.deadline += 0 if options.seconds else (PATIENCE - 1) * SECONDS
        print("no GPU is used: small sizes, Triton in its interpreter; times say nothing about a GPU")
    for part in parts(missing, has_gpu):
        if options.parts is None or part.name in options.parts:
            check.part(part, has_gpu, missing)

    print(f"\nresults in {options.out}")
    for state in check.states:
        words = {"skipped": "not run"}.get(state["status"], state["status"])
        print(f"  {words:8}{state['part']:24}{state['seconds']:7.1f} s  {state['reason']}")
    return int(any(state["status"] == "failed" for state in check.states))


if __name__ == "__main__":
    sys.exit(main())
