"""The command lines of the project: flags, logging, errors and exit codes."""

import argparse
import errno
import io
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

from evotok_plugin.common.command_parser import CommandParser
from evotok_plugin.common.interruption import Stopped, stop_on_signals
from evotok_plugin.common.requirements import require_extra, require_models
from evotok_plugin.common.version import VERSION
from evotok_plugin.errors import UserError

USER_ERROR = 2
INTERRUPTED = 128 + signal.SIGINT
OUTPUT_CLOSED = 141  # 128 + SIGPIPE, which not every system has
# Refusals of the file system that a user can fix, whatever was read or written.
_REFUSALS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG)
_LONGEST_PATH = 200  # characters of a path in a message
_LONGEST_MESSAGE = 4000  # characters; a message may quote a value of a file

Work = Callable[[argparse.Namespace], int | None]


def run(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None = None,
    work: Work | None = None,
    stopped: str = "stopped",
    translate: Callable[[Sequence[str]], Sequence[str]] = list,
) -> int:
    """Parse flags, run a command, and return its exit code.

    A `UserError` and a refusal of the file system (permissions, full disk, name too long) are shown as one line on
    stderr; Ctrl-C, SIGTERM and SIGHUP as the line `stopped`. With `--debug`, a traceback precedes them. A closed output
    (`| head`) ends the command silently. Any other exception is a bug and keeps its traceback.

    Args:
        parser: sets `run`, the function that takes the parsed flags and returns an exit code or None, unless `work` is
            given. If it sets `takes_rest`, unknown flags are passed as `rest`, together with `debug`; otherwise they
            are an error.
        argv: the command-line arguments, by default `sys.argv[1:]`.
        work: replaces the parser's `run`.
        stopped: the line shown after Ctrl-C, SIGTERM or SIGHUP.
        translate: replaces flags of another program by those of the parser, before they are parsed.

    Returns:
        The exit code: that of the work, 2 for a user error, 128 + the number of a signal (130 after Ctrl-C), 141 if the
        output was closed.
    """
    return _run(lambda: parser, argv, work, stopped, translate)


def run_command(
    prog: str,
    description: str,
    commands: Mapping[str, str],
    add: Callable[["argparse._SubParsersAction", str], object],
    argv: Sequence[str] | None = None,
    stopped: str = "stopped",
    needs_torchvision: bool = False,
    epilog: str = "",
) -> int:
    """`run` for a program of several commands.

    Args:
        commands: the help of every command by its name.
        add: adds a command, by its name, with its flags. It is called only for the command that `argv` names, so that
            `--help` does not import the others.
        needs_torchvision: whether a command uses transformers' image processors based on torchvision.
        epilog: the text under the list of commands.
    """

    def make_parser() -> argparse.ArgumentParser:
        return parser_of(prog, description, commands, add, _arguments(argv), epilog)

    return _run(make_parser, argv, None, stopped, needs_torchvision=needs_torchvision)


def exit_without(extra: str) -> None:
    """Exit with one line on stderr, as `run` does for a user error, unless an extra is installed.

    A module that is started with `python -m` and imports libraries of an extra calls it before these imports, which
    would fail with a traceback.
    """
    _quiet_loggers()
    try:
        require_extra(extra, "this command")
    except UserError as error:
        sys.exit(_report(str(error), debug=False))


def parser_of(
    prog: str,
    description: str,
    commands: Mapping[str, str],
    add: Callable[["argparse._SubParsersAction", str], object],
    argv: Sequence[str],
    epilog: str = "",
) -> argparse.ArgumentParser:
    """The parser of a program of several commands; only the command that `argv` names has its flags."""
    parser = CommandParser(prog=prog, description=description, epilog=epilog)
    parser.add_argument("--version", action="version", version=f"{prog} {VERSION}", help="show the version")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    named = next((word for word in argv if not word.startswith("-")), None)
    for name, text in commands.items():
        if name == named:
            add(subparsers, name)
            command = subparsers.choices[name]
            command.description = " ".join(filter(None, [f"{text[0].upper()}{text[1:]}.", command.description]))
        else:
            subparsers.add_parser(name, help=text)
    return parser


def deferred(module: str) -> Work:
    """A function that calls `run` of a module. The module is imported only then, so flags are parsed without it."""

    def run(arguments: argparse.Namespace) -> int | None:
        return import_module(module).run(arguments)

    return run


def add_from(package: str) -> Callable[["argparse._SubParsersAction", str], None]:
    """The `add` of `run_command` for commands that are modules of a package: `NAME.add(subparsers)`."""

    def add(subparsers: "argparse._SubParsersAction", name: str) -> None:
        import_module(f"{package}.{name}").add(subparsers)

    return add


def _arguments(argv: Sequence[str] | None) -> Sequence[str]:
    return sys.argv[1:] if argv is None else argv


def _run(
    make_parser: Callable[[], argparse.ArgumentParser],
    argv: Sequence[str] | None,
    work: Work | None,
    stopped: str,
    translate: Callable[[Sequence[str]], Sequence[str]] = list,
    needs_torchvision: bool = False,
) -> int:
    with stop_on_signals():
        return _run_until_stopped(make_parser, argv, work, stopped, translate, needs_torchvision)


def _run_until_stopped(
    make_parser: Callable[[], argparse.ArgumentParser],
    argv: Sequence[str] | None,
    work: Work | None,
    stopped: str,
    translate: Callable[[Sequence[str]], Sequence[str]],
    needs_torchvision: bool,
) -> int:
    debug = "--debug" in _arguments(argv)
    try:
        _print_any_name()
        require_models("this command")
        arguments, work = _parse(make_parser(), translate(_arguments(argv)), work)
        _quiet_libraries(needs_torchvision)
        code = work(arguments) or 0
        sys.stdout.flush()
        return code
    except UserError as error:
        return _report(str(error), debug)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout again when it exits
        return OUTPUT_CLOSED
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        return _report(_refusal(error), debug)
    except KeyboardInterrupt as error:
        if debug:
            traceback.print_exc()
        print(stopped, file=sys.stderr)
        return 128 + error.number if isinstance(error, Stopped) else INTERRUPTED


def _report(message: str, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    line = " ".join(message.split())
    line = line if len(line) <= _LONGEST_MESSAGE else f"{line[:_LONGEST_MESSAGE]}..."
    print(f"error: {line}", file=sys.stderr)
    return USER_ERROR


def _refusal(error: OSError) -> str:
    """The message of an error of the file system; the path is cut if it is very long."""
    remedy = {
        errno.ENAMETOOLONG: "expected a path, give a shorter one",
        errno.ENOSPC: "make room, or choose another output",
        errno.EDQUOT: "make room, or choose another output",
    }.get(error.errno or 0, "change its permissions, or choose another path")
    path = "" if error.filename is None else str(error.filename)
    path = path if len(path) <= _LONGEST_PATH else f"{path[:_LONGEST_PATH]}..."
    return f"{path or 'the output'}: {error.strerror}; {remedy}"


def _print_any_name() -> None:
    """Print names of files that are not valid in the terminal's encoding with escapes, as stderr does."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str], work: Work | None) -> tuple[argparse.Namespace, Work]:
    """The flags, and the function to run."""
    from evotok_plugin.common.recipes import flags_of, reject_unknown_flags  # requires PyYAML

    commands = _commands_of(parser)
    for each in [parser, *commands]:
        each.add_argument("--debug", action="store_true", help="show the traceback of an error")
    for each in commands or [parser]:
        each.set_defaults(flags=flags_of(each))
    arguments, rest = parser.parse_known_args(argv)
    values = vars(arguments)
    flags = values.pop("flags")
    debug = values.pop("debug")
    if values.pop("takes_rest", False):
        arguments.rest, arguments.debug = rest, debug
    else:
        reject_unknown_flags(rest, flags)
    return arguments, work or values.pop("run")


def _commands_of(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """The parsers of all commands, including nested ones."""
    found: list[argparse.ArgumentParser] = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                found += _commands_of(command) or [command]
    return found


def _quiet_libraries(needs_torchvision: bool) -> None:
    """Hide warnings and progress bars of libraries that a user cannot act on."""
    _quiet_loggers()
    transformers: Any = import_module("transformers") if needs_torchvision else _transformers_without_torchvision()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)  # libraries warn about each other
    warnings.filterwarnings("ignore", message="OMP_NUM_THREADS/MKL_NUM_THREADS unset")  # accelerate, on every start
    warnings.formatwarning = _one_line


def _quiet_loggers() -> None:
    """Hide what libraries log while they are imported, before any logging is configured."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a kernel for CPUs that it could download
    logging.getLogger("DeepSpeed").addFilter(_is_no_choice_of_the_cpu)


def _is_no_choice_of_the_cpu(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Setting accelerator to CPU")  # on every start without a GPU


def _one_line(message: Warning | str, *place: Any, **line: Any) -> str:
    """Format a warning without its place in the code, which a user of a command cannot act on."""
    return f"warning: {message}\n"


def _transformers_without_torchvision() -> Any:
    """Import transformers without torchvision, which it would import for image processors that no command uses.

    AutoImageProcessor and AutoProcessor would now choose processors based on PIL, whose pixels differ slightly. The
    metrics that need torchvision still import it themselves.
    """
    if "torchvision" not in sys.modules:
        sys.modules["torchvision"] = None  # type: ignore[assignment]  # how Python marks a module that is not installed
        try:
            from transformers.utils import is_torchvision_available

            is_torchvision_available()  # the result is cached for the rest of the process
        finally:
            del sys.modules["torchvision"]
    return import_module("transformers")
