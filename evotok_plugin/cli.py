"""`evotok train | encode | reconstruct | evolve | evaluate | convert`: the tokenizer on the command line."""

import argparse
import sys

from evotok_plugin.commands import convert, encode, evaluate, evolve, reconstruct, train
from evotok_plugin.commands.options import shared_options
from evotok_plugin.common import command_line


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="evotok", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (train, encode, reconstruct, evolve, evaluate, convert):
        command.add(commands, shared_options())
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    return command_line.run(build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
