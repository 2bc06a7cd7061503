"""The check of a GPU: its CPU mode, parts that fail or are stopped, and the resources of the compiled kernel."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
CHECK = ROOT / "scripts" / "gpu" / "check.sh"
# Packages that a machine with a GPU may lack.
ABSENT = ("deepspeed", "lmms_eval", "datasets", "lpips", "bitsandbytes", "open_clip", "torch_fidelity")
BLOCKER = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
import importlib.util
found = importlib.util.find_spec
def find_spec(name, package=None):
    return None if name.partition(".")[0] in {ABSENT} else found(name, package)
importlib.util.find_spec = find_spec
"""


@pytest.fixture
def bare(tmp_path):
    """The environment of a machine without some packages and without an installation of the project."""
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(BLOCKER)
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_HUB_OFFLINE")}
    cache = {"TRITON_CACHE_DIR": str(tmp_path / "triton"), "OMP_NUM_THREADS": "1"}
    return {**kept, **cache, "PYTHON": sys.executable, "PYTHONPATH": str(folder), "CUDA_VISIBLE_DEVICES": ""}


def run(out, environment, *flags):
    return subprocess.run(
        ["bash", str(CHECK), str(out), *flags], env=environment, cwd=out.parent, capture_output=True, text=True
    )


def read(out, name):
    return json.loads((out / f"{name}.json").read_text())


def states(out):
    return {one["part"]: one["status"] for one in read(out, "summary")["parts"]}


@pytest.mark.slow
def test_every_part_without_a_gpu(tmp_path, bare):
    out = tmp_path / "out"
    done = run(out, bare, "--cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    found = states(out)
    assert found.pop("gpu_tests") == "skipped" and set(found.values()) == {"passed"} and len(found) == 9
    assert "not run gpu_tests" in done.stdout and "needs a GPU" in done.stdout
    machine = read(out, "machine")
    assert set(ABSENT) & {"deepspeed", "lpips"} <= set(machine["result"]["missing"])
    for name in found:
        part = read(out, name)
        assert part["device"] == machine["result"]["cpu"] and part["torch"] and part["date"]
        assert name == "machine" or part["rows"] and part["command"].startswith("python scripts/")
    exactness = read(out, "search_kernel")["result"]["exactness"]
    assert {one["search"] for one in exactness} == {"fused kernel", "without Triton"}
    assert len(exactness) == 22 and not any(one["wrong"] for one in exactness)
    assert all(one["first_difference"] is None for one in read(out, "graphs")["result"]["cases"])
    for name in ("drawing", "drawing_without_graphs"):
        assert all(one["same_codes"] for one in read(out, name)["result"]["results"])
    rows = (out / "rows.md").read_text().splitlines()
    assert len(rows) == 2 + sum(len(read(out, name)["rows"]) for name in found)
    assert all(row.count("|") == 7 for row in rows)


def test_two_parts_without_a_gpu(tmp_path, bare):
    out = tmp_path / "out"
    done = run(out, bare, "--parts", "gpu_tests", "quantizer")
    assert done.returncode == 0, done.stdout + done.stderr
    assert states(out) == {"machine": "passed", "gpu_tests": "skipped", "quantizer": "passed"}
    assert "no GPU is used" in done.stdout and "missing packages: lpips, datasets, deepspeed" in done.stdout
    result = read(out, "quantizer")["result"]["results"][0]
    assert result["codes_unlike_float64"] == 0 and result["contestants"]["ours, evaluation"]["milliseconds"] > 0
    assert "| quantizer | ours, evaluation, 1 images |" in (out / "rows.md").read_text()


@pytest.mark.parametrize(
    ("flags", "message"), [(["--parts", "kernels"], "unknown parts: kernels"), ([], "is not an empty folder")]
)
def test_wrong_input_is_an_error(tmp_path, bare, flags, message):
    out = tmp_path / "out"
    if not flags:
        out.mkdir()
        (out / "earlier.json").touch()
    done = run(out, bare, *flags)
    assert done.returncode == 2 and message in done.stderr


@pytest.fixture
def module(monkeypatch):
    return runpy.run_path(str(ROOT / "scripts" / "gpu" / "check.py"))


def part_of(module, code, seconds=20, **options):
    command = ["-c", f"import json, pathlib, sys, time; file = pathlib.Path('{{json}}'); {code}"]
    return module["Part"]("some", seconds, command, command, (), lambda result: [("x", str(result["x"]))], **options)


@pytest.mark.parametrize(
    ("code", "seconds", "reason"),
    [
        ("file.write_text(json.dumps({'x': 1})); sys.exit(3)", 20, "exit code 3"),
        ("file.write_text(json.dumps({'x': 1})); time.sleep(60)", 3, "stopped after its time limit of 3 s"),
        ("file.write_text(json.dumps({'x': 1}))", 20, "x is 1"),
    ],
)
def test_a_part_that_fails_keeps_its_results_and_those_of_earlier_parts(tmp_path, module, code, seconds, reason):
    check = module["Check"](tmp_path, 60)
    check.part(part_of(module, "file.write_text(json.dumps({'x': 7}))"), has_gpu=False, missing=[])
    first = (tmp_path / "rows.md").read_text()
    wrong = {"wrong": lambda result: "x is 1"} if reason == "x is 1" else {}
    check.part(part_of(module, code, seconds, **wrong), has_gpu=False, missing=[])
    assert [one["status"] for one in check.states] == ["passed", "failed"]
    assert reason in check.states[1]["reason"] and read(tmp_path, "some")["result"] == {"x": 1}
    rows = (tmp_path / "rows.md").read_text()
    assert rows.startswith(first) and "| x | 7 |" in first and reason in rows.splitlines()[-1]


def test_a_part_without_results_fails_and_one_without_packages_or_time_is_not_run(tmp_path, module):
    check = module["Check"](tmp_path, 60)
    check.part(part_of(module, "pass"), has_gpu=False, missing=[])
    check.part(module["Part"]("tests", 9, [], [], ("pytest",), dict), has_gpu=True, missing=["pytest"])
    check.deadline = 0
    check.part(part_of(module, "pass"), has_gpu=False, missing=[])
    found = [(one["status"], one["reason"]) for one in check.states]
    assert found == [
        ("failed", "no results, see some.log"), ("skipped", "missing packages: pytest"), ("skipped", "no time left")
    ]  # fmt: skip


def test_all_parts_together_take_at_most_nine_minutes(module):
    parts = module["parts"](["lpips"])
    assert sum(part.seconds for part in parts) + 25 <= module["SECONDS"] <= 9 * 60
    steps = next(part for part in parts if part.name == "tokenizer_step")
    assert steps.gpu[-1] == "lpips_weight=0" and "lpips_weight=0" not in module["parts"]([])[-2].gpu


def test_the_tests_for_a_gpu_are_found_and_their_outcomes_read(module):
    files = [Path(word).name for word in module["tests_command"]() if word.endswith(".py")]
    assert {"test_quantizer.py", "test_images.py"} <= set(files) and "test_recipes.py" not in files
    text = (
        "<testsuites><testsuite><testcase name='a' time='1.5'/><testcase name='b'><failure/></testcase>"
        "<testcase name='c'><skipped/></testcase></testsuite></testsuites>"
    )
    result = module["read_tests"](text)
    assert [test["outcome"] for test in result["tests"]] == ["passed", "failed", "skipped"]
    assert module["wrong_tests"](result) == "failed: b"
    assert module["wrong_tests"]({"tests": result["tests"][2:]}) == "no test passed"
    assert module["test_rows"](result) == [("tests marked `gpu`", "1 passed, 1 failed, 1 skipped")]


def test_wrong_codes_fail_the_check(module):
    exact = {"search": "fused kernel", "case": "random", "codes": 9, "wrong": 0}
    timed = {"search": "fused kernel, 64 x 64, 4 warps", "same_codes": True}
    assert module["wrong_codes"]({"exactness": [exact], "times": [timed]}) == ""
    assert "random" in module["wrong_codes"]({"exactness": [{**exact, "wrong": 1}], "times": []})
    assert "64 x 64" in module["wrong_codes"]({"exactness": [exact], "times": [{**timed, "same_codes": False}]})
    assert "with 8 images" in module["wrong_search"]({"results": [{"images": 8, "codes_unlike_float64": 2}]})
    case = {"options": "greedy", "first_difference": 3}
    assert "greedy from position 3" in module["wrong_draws"]({"cases": [case]})


def test_the_kernel_compiles_for_hopper_without_spills(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    command = [sys.executable, str(ROOT / "scripts/gpu/kernel_resources.py"), "--capability", "90", "--json"]
    subprocess.run([*command, str(tmp_path / "r.json")], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    launched, ieee, *_ = json.loads((tmp_path / "r.json").read_text())["results"]
    assert launched["precision"] == "tf32x3" and launched["spilled_bytes"] == launched["stack_bytes"] == 0
    assert 0 < launched["registers"] <= 255 and launched["tensor_core_instructions"].startswith("wgmma")
    assert launched["blocks_per_multiprocessor"] >= 1 and ieee["tensor_core_instructions"] == "none"
