"""Command lines: exit codes, one line for a user error, a traceback for everything else."""

import argparse
import errno
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from evotok_plugin.common import command_line
from evotok_plugin.errors import UserError


def parser_for(work, **defaults):
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=1)
    parser.set_defaults(run=work, **defaults)
    return parser


def raising(error):
    def work(arguments):
        raise error

    return work


@pytest.mark.parametrize(("result", "code"), [(None, 0), (0, 0), (1, 1)])
def test_the_exit_code_is_the_result_of_the_work(result, code):
    assert command_line.run(parser_for(lambda arguments: result), []) == code


def test_the_work_gets_only_its_own_flags():
    seen = {}
    command_line.run(parser_for(lambda arguments: seen.update(vars(arguments))), ["--steps", "3", "--debug"])
    assert seen == {"steps": 3}


def test_a_user_error_is_one_line(capsys):
    assert command_line.run(parser_for(raising(UserError("steps: expected 1, got 2"))), []) == 2
    assert capsys.readouterr().err == "error: steps: expected 1, got 2\n"


def test_debug_adds_the_traceback(capsys):
    assert command_line.run(parser_for(raising(UserError("wrong"))), ["--debug"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback") and lines[-1] == "error: wrong"


@pytest.mark.parametrize("error", [ValueError("a bug"), TypeError("a bug"), OSError("a bug")])
def test_every_other_error_keeps_its_traceback(error):
    with pytest.raises(type(error), match="a bug"):
        command_line.run(parser_for(raising(error)), [])


def test_refusals_of_the_file_system_are_one_line(capsys):
    name = 300 * "x"
    assert command_line.run(parser_for(lambda arguments: Path(name).exists()), []) == 2
    assert capsys.readouterr().err == (
        f"error: {name[:200]}...: File name too long; expected a path, give a shorter one\n"
    )
    refused = PermissionError(errno.EACCES, "Permission denied", "models/a")
    assert command_line.run(parser_for(raising(refused)), []) == 2
    assert "models/a: Permission denied; change its permissions" in capsys.readouterr().err
    assert command_line.run(parser_for(raising(OSError(errno.ENOSPC, "No space left on device"))), []) == 2
    assert "the output: No space left on device; make room" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has /dev/full")
def test_a_full_or_closed_output_ends_without_a_traceback():
    code = (
        "import argparse, sys\nfrom evotok_plugin.common import command_line\n"
        "def work(arguments):\n    for _ in range(20000):\n        print('caf\\udce9')\n"
        "sys.exit(command_line.run(argparse.ArgumentParser(), [], work))"
    )
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "No space left" in done.stderr
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "caf\\udce9\n"
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == command_line.OUTPUT_CLOSED


def test_ctrl_c_prints_a_line_and_exits_with_130(capsys):
    assert command_line.run(parser_for(raising(KeyboardInterrupt())), [], stopped="stopped; resume") == 130
    assert capsys.readouterr().err == "stopped; resume\n"


def test_unknown_flags_are_rejected_unless_the_command_accepts_them(capsys):
    seen = []
    assert command_line.run(parser_for(seen.append), ["--stepz", "3"]) == 2
    assert "--stepz; did you mean --steps?" in capsys.readouterr().err and not seen
    assert command_line.run(parser_for(seen.append, takes_rest=True), ["--other", "3"]) == 0
    assert seen[0].rest == ["--other", "3"]


def test_only_the_named_command_is_imported(capsys):
    added = []

    def add(subparsers, name):
        added.append(name)
        subparsers.add_parser(name).set_defaults(run=lambda arguments: 7)

    commands = {"one": "the first", "two": "the second"}
    assert command_line.run_command("program", "Two commands.", commands, add, ["two"]) == 7
    assert added == ["two"]
    assert command_line.run_command("program", "Two commands.", commands, add, ["--debug", "two", "--debug"]) == 7
    assert added == ["two", "two"]
    with pytest.raises(SystemExit):
        command_line.run_command("program", "Two commands.", commands, add, ["--help"])
    assert added == ["two", "two"] and "the first" in (shown := capsys.readouterr().out) and "the second" in shown


@pytest.mark.parametrize("module", ["evotok_plugin", "llava_ext", "eval_tasks"])
def test_ctrl_c_and_user_errors_are_handled_alike_by_all_programs(module, monkeypatch, capsys):
    from importlib import import_module

    cli = import_module(f"{module}.cli")
    names = {"evotok_plugin": "evaluate", "llava_ext": "merge", "eval_tasks": "report"}
    given = {"evotok_plugin": ["absent.png"], "llava_ext": ["a", "b", "-o", "c"], "eval_tasks": ["absent"]}
    command = import_module(f"{module}.commands.{names[module]}")
    monkeypatch.setattr(command, "run", raising(KeyboardInterrupt()))
    assert cli.main([names[module], *given[module]]) == 130
    assert capsys.readouterr().err.startswith("stopped")
    monkeypatch.setattr(command, "run", raising(UserError("fix it")))
    assert cli.main([names[module], *given[module]]) == 2
    assert capsys.readouterr().err == "error: fix it\n"


@pytest.mark.parametrize(("module", "expected"), [("llava_ext", False), ("eval_tasks", True)])
def test_only_the_judge_uses_image_processors_based_on_torchvision(module, expected):
    given = {"llava_ext": ["draw", ""], "eval_tasks": ["judge", "absent"]}  # both end with an error of the user
    code = (
        f"from {module} import cli\nassert cli.main({given[module]!r}) == 2\n"
        "from transformers.utils import is_torchvision_available; print(is_torchvision_available())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    installed = importlib.util.find_spec("torchvision") is not None
    assert done.stdout.strip() == str(expected and installed)


SLOW = ("numpy", "torch", "transformers")


@pytest.mark.parametrize("module", ["evotok_plugin", "llava_ext", "eval_tasks"])
def test_flags_are_parsed_without_slow_imports(module):
    cli = importlib.import_module(f"{module}.cli")
    stages = getattr(cli, "STAGES", {})  # their flags are those of transformers' TrainingArguments
    code = (
        f"import contextlib, io, sys\nfrom {module} import cli\n"
        f"for name in {[name for name in cli.COMMANDS if name not in stages]!r}:\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as shown:\n"
        "        cli.main([name, '--help'])\n"
        "    assert 'usage: ' in shown.getvalue(), name\n"
        f"    print(name, [one for one in {SLOW!r} if one in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines and all(line.endswith(" []") for line in lines), done.stdout
