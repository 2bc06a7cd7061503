"""`evotok train | encode | reconstruct | evolve | evaluate | convert`: the tokenizer on the command line."""

import argparse
import logging
import sys

import transformers

from evotok_plugin.commands import convert, encode, evaluate, evolve, reconstruct, train
from evotok_plugin.commands.options import shared_options
from evotok_plugin.common.recipes import flags_of, reject_unknown_flags


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="evotok", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (train, encode, reconstruct, evolve, evaluate, convert):
        command.add(commands, shared_options())
    for subparser in commands.choices.values():
        subparser.set_defaults(flags=flags_of(subparser))
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command; user errors end as one line and exit code 2."""
    arguments, rest = build_parser().parse_known_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        reject_unknown_flags(rest, arguments.flags)
        arguments.run(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
