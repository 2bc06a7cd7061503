"""`evotok-llava draw | chat | demo | merge | export | estimate | convert`: use a trained model, prepare one for others,
estimate a training run."""

import argparse
import sys

from evotok_plugin.common import command_line
from llava_ext.commands import chat, convert, demo, draw, estimate, export, merge
from llava_ext.commands.options import shared_options


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="evotok-llava", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (draw, chat, demo, convert, merge, export, estimate):
        command.add(commands, shared_options())
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    return command_line.run(build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
