"""Programs where only the base dependencies are installed: one line that names the extra, and no traceback."""

import json
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("evotok_plugin", "llava_ext", "eval_tasks")
EXTRAS = {  # of programs that need more than the models
    "llava_ext.training.train": "train",
    "llava_ext.training.reinforcement.train": "train",
    "llava_ext.training.flag_tables": "train",
    "eval_tasks.judging.scene_detector": "eval",
}
RUNNER = "evotok_plugin.llava"  # part of the base installation
FLAGS = {"without flags": [], "help": ["--help"]}

# Forks once per program after torch has been imported; every child writes its stderr to a file of its own.
STARTER = """
import importlib.metadata, json, os, runpy, sys

given = json.load(sys.stdin)
found = importlib.metadata.Distribution.from_name

def from_name(name):
    if name in given["distributions"]:
        raise importlib.metadata.PackageNotFoundError(name)
    return found(name)

importlib.metadata.Distribution.from_name = from_name
sys.modules.update(dict.fromkeys(given["modules"]))  # None: cannot be imported
import torch

codes = {}
for number, (module, *flags) in enumerate(given["programs"]):
    if (child := os.fork()) == 0:
        os.dup2(os.open(str(number), os.O_CREAT | os.O_WRONLY), 2)
        sys.argv = [module, *flags]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        sys.exit(0)
    codes[number] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(json.dumps(codes))
"""


def programs() -> list[str]:
    """The modules that can be started with `python -m`."""
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    started = [file for file in files if '\nif __name__ == "__main__":\n' in file.read_text()]
    return sorted(".".join(file.relative_to(ROOT).with_suffix("").parts) for file in started)


def base_distributions() -> set[str]:
    """The installed distributions that the base dependencies require, in any number of steps."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    waiting, found = [Requirement(line) for line in project["dependencies"]], set[str]()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        needed = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if needed and name not in found:
            try:
                waiting += map(Requirement, metadata.requires(name) or [])
            except metadata.PackageNotFoundError:  # torch's own for another machine
                continue
            found.add(name)
    return found


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[tuple[str, str], tuple[int, str]]:
    """Exit code and stderr by program and flags."""
    folder, base = tmp_path_factory.mktemp("base"), base_distributions()
    owners = {module: {canonicalize_name(name) for name in names} for module, names in distributions().items()}
    own = {"evotok", *PACKAGES}
    cases = [(program, name) for program in programs() for name in FLAGS]
    given = {
        "distributions": sorted({name for names in owners.values() for name in names} - base - own),
        "modules": sorted(module for module, names in owners.items() if not names & base and module not in own),
        "programs": [[program, *FLAGS[name]] for program, name in cases],
    }
    done = subprocess.run(
        [sys.executable, "-c", STARTER], input=json.dumps(given), cwd=folder, capture_output=True, text=True, check=True
    )
    codes = json.loads(done.stdout.splitlines()[-1])
    return {case: (codes[str(n)], (folder / str(n)).read_text()) for n, case in enumerate(cases)}


def distributions() -> dict[str, list[str]]:
    """The distributions of every importable name outside of the standard library."""
    found = metadata.packages_distributions()
    return {name: owners for name, owners in found.items() if name not in sys.stdlib_module_names}


def test_the_programs_are_found():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"].values()
    assert {script.partition(":")[0] for script in scripts} | set(EXTRAS) | {RUNNER} <= set(programs())


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("program", [program for program in programs() if program != RUNNER])
def test_a_program_names_the_extra_that_it_requires(outcomes, program, flags):
    code, error = outcomes[program, flags]
    expected = "error: this command requires transformers, which is not installed; pip install 'evotok[{}]' in an"
    assert code == 2 and error.count("\n") == 1, error
    assert error.startswith(expected.format(EXTRAS.get(program, "models")))


@pytest.mark.parametrize("flags", FLAGS)
def test_the_runner_for_llava_works(outcomes, flags):
    code, error = outcomes[RUNNER, flags]
    assert code == 2 and error.startswith("error: expected a program, got ") and error.count("\n") == 1
