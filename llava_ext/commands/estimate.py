"""`evotok-llava estimate`: estimate the memory and the tokens per step of a training run."""

import argparse
import sys

from evotok_plugin.common.recipes import add_arguments, flags_of, reject_unknown_flags
from llava_ext.commands.options import SharedOptions


def add(commands: argparse._SubParsersAction, shared: SharedOptions) -> None:
    parser = commands.add_parser(
        "estimate",
        epilog="All other flags of training are accepted as well, as in `scripts/finetune.sh`.",
    )
    parser.add_argument("--recipe", required=True, help="YAML file, or the name of a recipe of the project")
    parser.add_argument("--gpus", type=int, default=1, help="number of GPUs, with one process each")
    parser.set_defaults(run=run, takes_rest=True)


def run(arguments: argparse.Namespace) -> None:
    """Print the estimate."""
    from llava_ext.training.config import StageConfig  # slow imports that no other command needs
    from llava_ext.training.estimate import estimate_run
    from llava_ext.training.llava_flags import translate

    stage = argparse.ArgumentParser(prog="evotok-llava estimate", allow_abbrev=False)
    add_arguments(stage, StageConfig)
    given, rest = stage.parse_known_args(translate(arguments.rest, lambda line: print(line, file=sys.stderr)))
    reject_unknown_flags(rest, flags_of(stage))
    print(estimate_run(arguments.recipe, vars(given), arguments.gpus))
