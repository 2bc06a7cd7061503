"""The files of the task folders: functions named in YAML exist, and all data files are package data."""

import importlib
import re
import tomllib
from pathlib import Path

import pytest

from eval_tasks.commands import judge
from eval_tasks.registration import TASKS_FOLDER
from eval_tasks.tasks.benchmarks import BENCHMARKS

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("path", sorted(TASKS_FOLDER.rglob("*.yaml")), ids=lambda path: path.name)
def test_functions_named_in_yaml_exist(path):
    text = path.read_text()
    names = re.findall(r"!function ([\w.]+)", text)
    assert names or "group: evotok_mmvet" in text
    for name in names:
        module, _, function = name.rpartition(".")
        assert hasattr(importlib.import_module(module), function), name


def test_data_files_are_package_data():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["eval_tasks"]
    packaged = {path for pattern in patterns for path in (ROOT / "eval_tasks").glob(pattern)}
    data = {path for path in TASKS_FOLDER.rglob("*") if path.suffix in (".yaml", ".jsonl")}
    assert data and data <= packaged
    assert all((folder / "__init__.py").is_file() for folder in TASKS_FOLDER.iterdir() if any(folder.glob("*.yaml")))


def test_the_judge_command_offers_all_benchmarks():
    assert set(judge.TASKS) == set(BENCHMARKS)
