"""The one way in which every command line of the project runs: flags, logging, errors and exit codes."""

import argparse
import logging
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence

from evotok_plugin.common.recipes import flags_of, reject_unknown_flags
from evotok_plugin.errors import UserError

USER_ERROR = 2
INTERRUPTED = 128 + signal.SIGINT


def run(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None = None,
    work: Callable[[argparse.Namespace], int | None] | None = None,
    stopped: str = "stopped",
    translate: Callable[[Sequence[str]], Sequence[str]] | None = None,
) -> int:
    """Parse flags, do the work, and translate how it ends.

    A `UserError` becomes one line on stderr, Ctrl-C the line `stopped`; with `--debug` both are followed by the
    traceback. Any other exception is a bug and keeps its traceback.

    Args:
        parser: its commands set `run`, the function that takes the parsed flags and returns an exit code or None. A
            command that sets `takes_rest` gets unknown flags as `rest`; for all others they are an error.
        argv: the command line, by default that of the process.
        work: what to run where the parser has no commands.
        stopped: the line that Ctrl-C ends with.
        translate: replaces flags of another program by those of the parser, before they are parsed.

    Returns:
        The exit code: that of the command, 2 for a user error, 130 after Ctrl-C.
    """
    commands = _commands_of(parser)
    for command in commands or [parser]:
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.set_defaults(flags=flags_of(command))
    given: Sequence[str] = sys.argv[1:] if argv is None else argv
    is_debugged = "--debug" in given
    try:
        arguments, rest = parser.parse_known_args(translate(given) if translate else given)
        arguments.rest = rest
        if not getattr(arguments, "takes_rest", False):
            reject_unknown_flags(arguments.rest, arguments.flags)
        _quiet_libraries()
        return (work or arguments.run)(arguments) or 0
    except UserError as error:
        if is_debugged:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        if is_debugged:
            traceback.print_exc()
        print(stopped, file=sys.stderr)
        return INTERRUPTED


def _commands_of(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """The parsers of all commands, those of commands within commands included."""
    found: list[argparse.ArgumentParser] = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                found += _commands_of(command) or [command]
    return found


def _quiet_libraries() -> None:
    """Leave the terminal to the command: warnings of libraries that a user cannot act on are not shown."""
    import transformers

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)  # between other libraries
