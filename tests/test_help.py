"""The help of all commands: a text for every option, a default where it takes a value, and examples that parse."""

import argparse
import importlib
import re
import runpy
import shlex
from pathlib import Path

import pytest

from eval_tasks import cli as eval_cli
from evotok_plugin import cli as tokenizer_cli
from evotok_plugin.common.command_parser import CommandParser, describe_default, examples_of
from llava_ext import cli as llava_cli
from llava_ext.commands import stages
from llava_ext.training.reinforcement.config import ReinforceConfig
from llava_ext.training.supported_arguments import SUPPORTED, UNSUPPORTED

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = {"evotok": tokenizer_cli, "evotok-llava": llava_cli, "evotok-eval": eval_cli}
COMMANDS = [
    (program, name) for program, cli in PROGRAMS.items() for name in cli.COMMANDS if name not in llava_cli.STAGES
]
SCRIPTS = [
    path.relative_to(ROOT)
    for path in sorted((ROOT / "scripts").rglob("*.py"))
    if re.search("ArgumentParser|CommandParser", text := path.read_text()) and "__main__" in text
]
NO_FLAGS = ("cli.py", "llava.py")  # programs of commands, and a runner of other programs
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for package in ("evotok_plugin", "llava_ext", "eval_tasks")
    for path in sorted((ROOT / package).rglob("*.py"))
    if "__main__" in (text := path.read_text()) and "def main(" in text and path.name not in NO_FLAGS
]


class Parsed(Exception):
    """Ends a program where it would parse its arguments; the argument is its parser."""


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")


@pytest.fixture
def parser_of(monkeypatch):
    """`parser_of(call)`: the parser that a program has built when it parses its arguments."""

    def stop(parser, *_, **__):
        raise Parsed(parser)

    def find(call):
        with monkeypatch.context() as patched, pytest.raises(Parsed) as parsed:
            patched.setattr(argparse.ArgumentParser, "parse_known_args", stop)
            call(patched)
        return parsed.value.args[0]

    return find


def subparsers_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    return {
        name: command
        for action in parser._actions
        if isinstance(action, argparse._SubParsersAction)
        for name, command in action.choices.items()
    }


def name_of(action: argparse.Action) -> str:
    long = [flag for flag in action.option_strings if flag.startswith("--")]
    return next(iter([*long, *action.option_strings]), action.metavar or action.dest)


def entries(parser: argparse.ArgumentParser) -> dict[str, str]:
    """The entry of every action in the help, by its name or its long flag."""
    text, found = parser.format_help(), {}
    for action in parser._actions:
        if action.help == argparse.SUPPRESS or isinstance(action, argparse._SubParsersAction):
            continue
        written = name_of(action)
        entry = re.search(rf"^  (-\w[^\n]*, )?{re.escape(written)}\b(.*?)(?=^  -|^\S|^\n|\Z)", text, re.M | re.S)
        assert entry, f"{parser.prog}: {written} is not in the help"
        found[written] = " ".join(entry[2].split())
    return found


def check_flags(parser: argparse.ArgumentParser) -> None:
    shown = entries(parser)
    for action in parser._actions:
        written = name_of(action)
        if written not in shown:
            continue
        assert action.help and action.help.strip() and not action.help.strip().startswith("("), (parser.prog, written)
        if action.option_strings and action.nargs != 0 and not action.required:
            assert re.search(r"default|\(required\)|\(recipe: ", shown[written]), (parser.prog, written, shown[written])


def check_examples(parser: argparse.ArgumentParser, name: str) -> None:
    """Parse the examples in the help that start with `name`; there is at least one."""
    words_of_name = shlex.split(name)
    lines = re.findall(rf"^ +(?:\S+ )*?{re.escape(name)}\b.*", parser.format_help(), re.M)
    lines = [shlex.split(line, comments=True) for line in lines]
    examples = [words for words in lines if _arguments(words, words_of_name) is not None]
    assert examples, f"{parser.prog}: no example of {name!r}"
    for words in examples:
        _, rest = parser.parse_known_args(_arguments(words, words_of_name))
        assert not rest or parser.get_default("takes_rest"), words
        if rest:  # flags of a stage
            stages.help_parser("finetune", "finetune").parse_args(rest)


def _arguments(words: list[str], name: list[str]) -> list[str] | None:
    """The arguments of an example, without a launcher and variables of the environment; None for other programs."""
    for start in range(len(words)):
        if words[start : start + len(name)] == name:
            return words[start + len(name) :]
    return None


@pytest.mark.parametrize(("program", "name"), COMMANDS, ids=lambda value: value)
def test_help_of_a_command(program, name, parser_of):
    command = subparsers_of(parser_of(lambda _: PROGRAMS[program].main([name])))[name]
    for words, parser in {name: command, **{f"{name} {n}": p for n, p in subparsers_of(command).items()}}.items():
        check_flags(parser)
        check_examples(parser, f"{program} {words}" if parser is not command else f"{program} {name}")


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_of_a_program(program, parser_of):
    parser = parser_of(lambda _: PROGRAMS[program].main([]))
    assert list(entries(parser)) == ["--help", "--version", "--debug"]
    assert list(subparsers_of(parser)) == list(PROGRAMS[program].COMMANDS)
    assert f"  {program} " in parser.format_help().partition("examples:")[2]


@pytest.mark.parametrize("name", llava_cli.STAGES)
def test_help_of_a_stage(name):
    parser = stages.help_parser(name, name.replace("-", "_"))
    check_flags(parser)
    check_examples(parser, f"evotok-llava {name}")


def test_help_of_a_stage_shows_the_settings_that_have_an_effect():
    parser = stages.help_parser("reinforce", "reinforce")
    shown = {flag.removeprefix("--") for flag in entries(parser)}
    known = {field for field in ReinforceConfig.__dataclass_fields__ if field != "learns_from_drawings"}
    assert shown == (known - UNSUPPORTED.keys()) | {"recipe", "debug", "help"} and shown >= SUPPORTED


def test_help_of_a_stage_shows_the_values_of_the_recipe():
    text = " ".join(stages.help_parser("finetune", "paper_finetune").format_help().split())
    assert "(recipe: 2e-05)" in text and "(recipe: {workspace}/paper/finetune)" in text
    assert "--max_grad_norm NUMBER Maximum gradient norm for gradient clipping (default: 1)" in text


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_help_of_a_script(script, parser_of):
    def run(patched):
        patched.setattr("sys.argv", [str(script)])
        patched.syspath_prepend(str((ROOT / script).parent))
        runpy.run_path(str(ROOT / script), run_name="__main__")

    parser = parser_of(run)
    check_flags(parser)
    check_examples(parser, f"python {script}")


@pytest.mark.parametrize("module", MODULES)
def test_help_of_a_module(module, parser_of):
    parser = parser_of(lambda _: importlib.import_module(module).main(["--recipe", "pretrain"]))
    check_flags(parser)
    check_examples(parser, f"python -m {module}")


def test_defaults_are_added_to_the_help_and_examples_keep_their_lines(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    parser = CommandParser(prog="p", epilog=examples_of("p --rate 2", "p", text="A long text " * 8))
    parser.add_argument("--rate", type=float, default=0.5, help="share in %%")
    parser.add_argument("--names", nargs="+", default=["a", "b%"], help="names")
    parser.add_argument("--given", help="own text (default: yours)")
    parser.add_argument("--needed", required=True, help="needed")
    parser.add_argument("--switch", action="store_true", help="switch")
    text = parser.format_help()
    assert "share in % (default: 0.5)" in text and "names (default: a b%)" in text
    assert text.count("default") == 3 and "examples:\n  p --rate 2\n  p\n\nA long text" in text
    assert max(map(len, text.splitlines())) <= 60


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "none"), ([], "none"), (False, "false"), (1e-3, "0.001"), ({"a": 1.0, "b": None}, "{a: 1, b: none}"),
     (list(range(9)), "0 1 2 3 4 5 ..., 9 values"), (Path("a/b"), "a/b"), (0, "0")],
)  # fmt: skip
def test_defaults_are_shown_as_they_are_typed(value, shown):
    assert describe_default(value) == shown
