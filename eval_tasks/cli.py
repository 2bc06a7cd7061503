"""`evotok-eval`: evaluation on the command line, on top of lmms-eval."""

import sys
from collections.abc import Sequence

from evotok_plugin.common import command_line
from evotok_plugin.common.command_parser import examples_of

DESCRIPTION = "Evaluate models with lmms-eval, judge drawn images, and report results."
COMMANDS = {
    "run": "run tasks one after another in lmms-eval and report all results",
    "judge": "judge images that were drawn before",
    "text": "compare text answers and losses with those of the LLM that a model was trained from",
    "report": "show results as a table and a plot next to published figures",
}

EXAMPLES = examples_of(
    "evotok-eval run --model outputs/finetune",
    "evotok-eval report mine=outputs/evaluation/outputs__finetune -o outputs/report",
    text="`evotok-eval COMMAND --help` shows the flags and examples of a command.",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    stopped = "stopped; rerun the command to resume"
    add = command_line.add_from("eval_tasks.commands")
    # `judge` opens image processors of transformers; without torchvision their pixels would differ slightly.
    return command_line.run_command(
        "evotok-eval", DESCRIPTION, COMMANDS, add, argv, stopped, needs_torchvision=True, epilog=EXAMPLES
    )


if __name__ == "__main__":
    sys.exit(main())
