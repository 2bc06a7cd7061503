"""`evotok-llava estimate`: estimate memory, disk and hours of a training run."""

import argparse
import sys

from evotok_plugin.common.command_parser import examples_of
from evotok_plugin.common.recipes import add_arguments, flags_of, recipe_help, reject_unknown_flags
from llava_ext.commands.options import SharedOptions


def add(commands: argparse._SubParsersAction, shared: SharedOptions) -> None:
    parser = commands.add_parser(
        "estimate",
        epilog=examples_of(
            "evotok-llava estimate --recipe paper --gpus 8 --samples 558000",
            "evotok-llava estimate --recipe paper_finetune_lora --gpus 2 --samples 665000 --model_max_length 4096",
            text="All other flags of the stage of the recipe are accepted as well, see `evotok-llava finetune --help`.",
        ),
    )
    parser.add_argument("--recipe", required=True, help=recipe_help("llava_ext"))
    parser.add_argument("--gpus", type=int, default=1, help="number of GPUs, with one process each")
    parser.add_argument("--samples", type=int, help="samples of an epoch, for the hours of a run without max_steps")
    parser.add_argument(
        "--mean_steps", type=float, help="mean LLM steps of a sample (default: an image and 128 text tokens)"
    )
    parser.add_argument("--drawn_share", type=float, default=0.5, help="share of the samples that draw")
    parser.set_defaults(run=run, takes_rest=True)


def run(arguments: argparse.Namespace) -> None:
    """Print the estimate."""
    from llava_ext.training.assumed_models import schema_of  # slow imports that no other command needs
    from llava_ext.training.estimate import Workload, estimate_run
    from llava_ext.training.stage_flags import translate_flags

    stage = argparse.ArgumentParser(prog="evotok-llava estimate", allow_abbrev=False)
    schema = schema_of(arguments.recipe)
    add_arguments(stage, schema)

    def notify(line: str) -> None:
        print(line, file=sys.stderr)

    given, rest = stage.parse_known_args(translate_flags(arguments.rest, notify, schema))
    reject_unknown_flags(rest, flags_of(stage))
    workload = Workload(arguments.samples, arguments.mean_steps, arguments.drawn_share)
    print(estimate_run(arguments.recipe, vars(given), arguments.gpus, workload))
