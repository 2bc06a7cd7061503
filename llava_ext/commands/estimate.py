"""`evotok-llava estimate`: what a training run will need."""

import argparse
import sys

from evotok_plugin.common.recipes import add_arguments, flags_of, reject_unknown_flags
from llava_ext.commands.options import SharedOptions


def add(commands: argparse._SubParsersAction, shared: SharedOptions) -> None:
    parser = commands.add_parser(
        "estimate",
        help="parameters, memory and tokens a step of a training run",
        epilog="every other flag of training may be given, too, as `scripts/finetune.sh` takes it",
    )
    parser.add_argument("--recipe", required=True, help="YAML file, or the name of a recipe of the project")
    parser.add_argument("--gpus", type=int, default=1, help="how many processes, one a GPU")
    parser.set_defaults(run=run, takes_rest=True)


def run(arguments: argparse.Namespace) -> None:
    """Say what a training run will need."""
    from llava_ext.training.config import StageConfig  # seconds of imports that no other command needs
    from llava_ext.training.estimate import estimate_run
    from llava_ext.training.llava_flags import translate

    stage = argparse.ArgumentParser(prog="evotok-llava estimate", allow_abbrev=False)
    add_arguments(stage, StageConfig)
    given, rest = stage.parse_known_args(translate(arguments.rest, lambda line: print(line, file=sys.stderr)))
    reject_unknown_flags(rest, flags_of(stage))
    print(estimate_run(arguments.recipe, vars(given), arguments.gpus))
