"""`evotok-llava merge`: merge an adapter into the model that it was trained on."""

import argparse

from evotok_plugin.common.command_parser import examples_of
from evotok_plugin.common.files import check_output_folder
from evotok_plugin.common.folders import check_new_folder
from llava_ext.commands.options import SharedOptions


def add(commands: argparse._SubParsersAction, shared: SharedOptions) -> None:
    parser = commands.add_parser(
        "merge",
        epilog=examples_of("evotok-llava merge outputs/pretrain outputs/finetune_lora/adapter -o outputs/merged"),
    )
    parser.add_argument("base", help="the model folder that training started from, or the causal LM")
    parser.add_argument("adapter", help="adapter folder or a checkpoint of the run")
    parser.add_argument("--vision_tower", help="tokenizer folder, needed if the base is a causal LM")
    parser.add_argument("-o", "--output", required=True, help="new folder for the merged model")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Merge a LoRA or QLoRA adapter into the model that it was trained on."""
    from llava_ext.training.adapters import merge  # peft comes with the training libraries

    check_output_folder(arguments.output)
    check_new_folder(arguments.output)
    merge(arguments.base, arguments.adapter, arguments.output, arguments.vision_tower)
    print(arguments.output)
