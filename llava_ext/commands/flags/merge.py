"""Flags of `evotok-llava merge`."""

import argparse

from evotok_plugin.common.command_line import deferred
from evotok_plugin.common.command_parser import examples_of
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
    parser.set_defaults(run=deferred("llava_ext.commands.merge"))
