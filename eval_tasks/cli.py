"""`evotok-eval`: evaluation on the command line, on top of lmms-eval."""

import sys
from collections.abc import Sequence

from evotok_plugin.common import command_line

DESCRIPTION = "Evaluate models with lmms-eval, judge drawn images, and report results."
COMMANDS = {
    "run": "run tasks one after another in lmms-eval and report all results",
    "judge": "judge images that were drawn before",
    "report": "show results as a table and a plot next to published figures",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    stopped = "stopped; rerun the command to resume"
    add = command_line.add_from("eval_tasks.commands")
    # `judge` opens image processors of transformers; without torchvision their pixels would differ slightly.
    return command_line.run_command("evotok-eval", DESCRIPTION, COMMANDS, add, argv, stopped, needs_torchvision=True)


if __name__ == "__main__":
    sys.exit(main())
