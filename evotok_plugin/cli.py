"""`evotok train | encode | reconstruct | evolve | evaluate | convert`: the tokenizer on the command line."""

import argparse
import logging
import sys

import transformers

from evotok_plugin.commands import convert, encode, evaluate, evolve, reconstruct, train
from evotok_plugin.commands.shared import shared_options


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="evotok", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (train, encode, reconstruct, evolve, evaluate, convert):
        command.add(commands, shared_options())
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command; user errors end as one line and exit code 2."""
    arguments = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        arguments.run(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
