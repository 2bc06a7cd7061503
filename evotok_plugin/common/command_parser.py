"""Parsers of commands, whose help shows the default of every option and keeps the lines of examples."""

import argparse
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

_MOST_VALUES = 6  # of a list that is a default


class CommandParser(argparse.ArgumentParser):
    """An `ArgumentParser` whose help shows defaults; its subcommands have the same class.

    The default of an option is added to its help, unless the help names it. A paragraph of the description and of the
    epilog with indented lines (examples) is shown as it is written; other paragraphs are wrapped.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"formatter_class": _HelpFormatter, **options})


class _HelpFormatter(argparse.HelpFormatter):
    """The format of `CommandParser`; argparse calls these methods of a formatter."""

    def add_argument(self, action: argparse.Action) -> None:
        super().add_argument(action)
        if isinstance(action, argparse._SubParsersAction):
            self._action_max_length += self._indent_increment  # argparse measures commands without their indent

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = re.split(r"\n\s*\n", text.strip())
        return "\n\n".join(
            textwrap.indent(paragraph, indent)
            if re.search(r"^[ \t]", paragraph, re.M)
            else textwrap.indent("\n".join(self._split_lines(paragraph, width)), indent)
            for paragraph in paragraphs
        )

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)  # keeps names of commands whole

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help
        takes_no_value = action.nargs == 0 or not action.option_strings
        if not text or takes_no_value or action.required or action.default == argparse.SUPPRESS or "default" in text:
            return text
        return f"{text} (default: {describe_default(action.default).replace('%', '%%')})"


def describe_default(value: Any) -> str:
    """A default as the help shows it: as it would be written on the command line, or `none`."""
    if value is None or value in ("", [], (), {}):
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {describe_default(one)}" for key, one in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        shown = " ".join(describe_default(one) for one in value[:_MOST_VALUES])
        return shown if len(value) <= _MOST_VALUES else f"{shown} ..., {len(value)} values"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) if isinstance(value, (int, str, PurePath)) else str(getattr(value, "value", value))


def examples_of(*commands: str, text: str = "") -> str:
    """The epilog of a command: examples, one a line, and a text below them."""
    lines = "\n".join(f"  {command}" for command in commands)
    return f"examples:\n{lines}\n\n{text}".strip()
