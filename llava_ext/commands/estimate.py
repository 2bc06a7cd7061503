"""`evotok-llava estimate`: estimate memory, disk and hours of a training run."""

import argparse
import sys

from evotok_plugin.common.recipes import add_arguments, flags_of, reject_unknown_flags


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
