"""Shell examples of the documentation: bash runs a block, and the programs that it starts run in this process.

Importing the libraries takes longer than most examples. Therefore bash finds recorders instead of the programs: it
parses the block and runs the scripts of the repository, and every program that it would start is written down, with its
arguments. The programs then run here, one after another.
"""

import io
import os
import runpy
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import pytest

from eval_tasks import cli as eval_cli
from evotok_plugin import cli as tokenizer_cli
from llava_ext import cli as llava_cli

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = {"evotok": tokenizer_cli.main, "evotok-llava": llava_cli.main, "evotok-eval": eval_cli.main}
RECORDED = (*PROGRAMS, "lmms-eval", "python", "torchrun", "deepspeed", "pip", "srun", "scontrol")
# Writes the number of words and the words, each followed by a zero byte. The scripts ask what the environment lacks:
# nothing. Of a cluster, `srun` starts its command, and `scontrol` prints the first node.
RECORDER = """#!/bin/bash
name="${0##*/}"
case "$name $1" in
  "srun "*) exec "$@" ;;
  "scontrol "*) echo host0; exit ;;
  "python "*/scripts/lib/missing.py) exit ;;
esac
printf '%s\\0' "$(($# + 1))" "$name" "$@" >> "$RECORD_FOLDER/calls"
"""
CLUSTER = {"SLURM_JOB_NODELIST": "host[0-1]", "SLURM_NNODES": "2", "SLURM_NODEID": "0"}


def programs_started_by(block: str, folder: Path, scratch: Path) -> list[list[str]]:
    """Run a block with bash in a folder; returns the words of every program that it started.

    Args:
        scratch: an empty folder for the recorders.
    """
    for name in RECORDED:
        (scratch / name).write_text(RECORDER)
        (scratch / name).chmod(0o755)
    environment = {**os.environ, **CLUSTER, "PATH": f"{scratch}:{os.environ['PATH']}", "VIRTUAL_ENV": str(scratch),
                   "RECORD_FOLDER": str(scratch), "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    fields = iter((scratch / "calls").read_text().split("\0")[:-1])
    return [[next(fields) for _ in range(int(count))] for count in fields]


def without_launcher(words: Sequence[str]) -> list[str]:
    """The words of one process: `python -m MODULE ...` for a program that torchrun would start several times.

    torchrun's own parser checks its flags.
    """
    if words[:3] == ["python", "-m", "evotok_plugin.common.launcher"]:
        return ["python", "-m", *words[3:]]
    if words[0] != "torchrun":
        return list(words)
    from torch.distributed.run import get_args_parser

    launched = get_args_parser().parse_args(words[1:])
    assert launched.module, words
    return ["python", "-m", launched.training_script, *launched.training_script_args]


def name_of(words: Sequence[str]) -> str:
    """The program with its command (`evotok train`, `evotok-llava data draw`), the module, or the script."""
    modules = {main.__module__: program for program, main in PROGRAMS.items()}
    if words[:2] == ["python", "-m"]:
        return f"{modules[words[2]]} {words[3]}" if words[2] in modules else words[2]
    if words[0] == "python":
        return Path(words[1]).name
    return " ".join(words[: 3 if words[1] == "data" else 2]) if words[0] in PROGRAMS else words[0]


def run_here(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Run a program in this process, with an empty standard input; returns its exit code."""
    program, *arguments = words
    with monkeypatch.context() as patched:
        patched.setattr("sys.stdin", io.StringIO())
        patched.setattr("llava_ext.commands.stages.start", lambda module, flags: import_module(module).main(flags))
        if program in PROGRAMS:
            return PROGRAMS[program](arguments)
        if program == "lmms-eval":
            return _run_lmms_eval(arguments, patched)
        assert program == "python", words
        if arguments[:2] == ["-m", "lmms_eval"]:
            return _run_lmms_eval(arguments[2:], patched)
        if arguments[:2] == ["-m", "pytest"]:
            return subprocess.run([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL).returncode
        if arguments[0] == "-m":
            return import_module(arguments[1]).main(arguments[2:])
        patched.setattr("sys.argv", arguments)
        patched.syspath_prepend(str((ROOT / arguments[0]).parent))
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(arguments[0], run_name="__main__")
        return ended.value.code or 0


def _run_lmms_eval(arguments: Sequence[str], patched: pytest.MonkeyPatch) -> int:
    """lmms-eval, whose errors reach the caller: on the command line it exits with 0 even on failure."""
    from eval_tasks import registration

    registration.register()
    from lmms_eval.__main__ import cli_evaluate

    patched.setattr("sys.argv", ["lmms-eval", *arguments, "--verbosity", "DEBUG"])
    cli_evaluate()
    return 0
