"""`evotok`: the tokenizer on the command line."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from evotok_plugin.common import command_line
from evotok_plugin.common.command_parser import examples_of

COMMANDS = {
    "train": "train a tokenizer",
    "encode": "encode images into a cache of codes",
    "reconstruct": "show images above their reconstructions",
    "evolve": "decode images level by level and plot what each level adds",
    "evaluate": "measure reconstruction, features and code usage",
    "convert": "convert a research checkpoint into a model folder",
    "export-tower": "write the vision tower with its own code, for any transformers",
}

EXAMPLES = examples_of(
    "evotok train --recipe photos --data photos --output_dir outputs/evotok",
    "evotok reconstruct photos -o reconstruction.png",
    "evotok evaluate photos",
    text="`evotok COMMAND --help` shows the flags and examples of a command.",
)


def _add(subparsers: "argparse._SubParsersAction", name: str) -> None:
    from evotok_plugin.commands.options import shared_options

    import_module(f"evotok_plugin.commands.flags.{name.replace('-', '_')}").add(subparsers, shared_options())


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    description = "Train, measure and use an EvoTok tokenizer."
    return command_line.run_command("evotok", description, COMMANDS, _add, argv, epilog=EXAMPLES)


if __name__ == "__main__":
    sys.exit(main())
