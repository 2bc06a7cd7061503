"""`evotok-llava merge`: merge an adapter into the model that it was trained on."""

import argparse

from evotok_plugin.common.files import check_output_folder
from evotok_plugin.common.folders import check_new_folder


def run(arguments: argparse.Namespace) -> None:
    """Merge a LoRA or QLoRA adapter into the model that it was trained on."""
    from llava_ext.training.adapters import merge  # peft comes with the training libraries

    check_output_folder(arguments.output)
    check_new_folder(arguments.output)
    merge(arguments.base, arguments.adapter, arguments.output, arguments.vision_tower)
    print(arguments.output)
