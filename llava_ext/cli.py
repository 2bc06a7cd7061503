"""`evotok-llava draw | chat | demo | merge | export | estimate | convert`: use a trained model, ready one for others,
see what a training run will need."""

import argparse
import logging
import sys
import warnings

import transformers

from evotok_plugin.common.recipes import flags_of, reject_unknown_flags
from llava_ext.commands import chat, convert, demo, draw, estimate, export, merge
from llava_ext.commands.options import shared_options


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="evotok-llava", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (draw, chat, demo, convert, merge, export, estimate):
        command.add(commands, shared_options())
    for subparser in commands.choices.values():
        subparser.set_defaults(flags=flags_of(subparser))
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command; user errors end as one line and exit code 2, Ctrl-C as exit code 130."""
    arguments, arguments.rest = build_parser().parse_known_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)  # between other libraries, nothing a user can change
    try:
        if arguments.run is not estimate.run:
            reject_unknown_flags(arguments.rest, arguments.flags)
        arguments.run(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
