"""The allowed versions of dependencies, and the tested ones."""

import importlib.metadata
import tomllib
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import eval_tasks.cli
import evotok_plugin.cli
import llava_ext.cli
from evotok_plugin.common.requirements import TRANSFORMERS

ROOT = Path(__file__).parents[1]
# Libraries whose classes are subclassed or whose internals are used: a newer version may break the project.
BOUNDED = {
    "torch", "torchvision", "transformers", "tokenizers", "huggingface_hub", "safetensors", "accelerate", "peft",
    "deepspeed", "datasets", "bitsandbytes", "lmms_eval", "gradio", "pillow", "open_clip_torch",
}  # fmt: skip


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirements() -> list[Requirement]:
    extras = project()["optional-dependencies"]
    return [Requirement(line) for line in chain(project()["dependencies"], *extras.values())]


def constraints() -> dict[str, str]:
    lines = (line.strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_libraries_with_used_internals_have_an_upper_bound():
    bounded = {
        requirement.name
        for requirement in requirements()
        if any(part.operator in ("<", "<=", "==") for part in requirement.specifier)
    }
    assert BOUNDED <= bounded
    models = [Requirement(line) for line in project()["optional-dependencies"]["models"]]
    assert not next(r for r in models if r.name == "transformers").specifier.contains("5.24")


def test_the_base_installation_fits_into_the_environments_of_the_llava_code_bases():
    pinned = {"torch": "2.1.2", "numpy": "1.26.4", "pillow": "10.0.0", "safetensors": "0.4.2"}
    base = {requirement.name: requirement for requirement in map(Requirement, project()["dependencies"])}
    assert set(base) == set(pinned)
    assert all(base[name].specifier.contains(version) for name, version in pinned.items())
    assert SpecifierSet(project()["requires-python"]).contains("3.10.13")


def test_the_required_versions_of_the_models_are_those_of_the_extra():
    models = {r.name: r for r in map(Requirement, project()["optional-dependencies"]["models"])}
    least = ".".join(map(str, TRANSFORMERS))
    assert f">={least}" in str(models["transformers"].specifier)


def test_the_tested_versions_are_allowed():
    tested = constraints()
    for requirement in requirements():
        if version := tested.get(requirement.name):
            assert requirement.specifier.contains(version), f"{requirement} excludes the tested {version}"


def test_the_license_is_declared_and_included():
    assert project()["license"] == "Apache-2.0" and project()["license-files"] == ["LICENSE"]
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text
    assert "Copyright 2026 EvoTok contributors" in text


def test_one_version_everywhere(capsys):
    for main in (evotok_plugin.cli.main, llava_ext.cli.main, eval_tasks.cli.main):
        with pytest.raises(SystemExit, match="0"):
            main(["--version"])
    assert capsys.readouterr().out.split() == [
        "evotok", evotok_plugin.__version__, "evotok-llava", evotok_plugin.__version__,
        "evotok-eval", evotok_plugin.__version__,
    ]  # fmt: skip
    assert importlib.metadata.version("evotok") == evotok_plugin.__version__
    assert f"\nversion: {evotok_plugin.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {evotok_plugin.__version__} " in (ROOT / "CHANGELOG.md").read_text()
