"""`evotok-eval run | judge | report`: evaluation on the command line, on top of lmms-eval."""

import argparse
import sys

from eval_tasks.commands import judge, report, run
from evotok_plugin.common import command_line


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="evotok-eval", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (run, judge, report):
        command.add(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    return command_line.run(build_parser(), argv, stopped="stopped; the same command resumes")


if __name__ == "__main__":
    sys.exit(main())
