"""Flags of `evotok-llava export`."""

import argparse

from evotok_plugin.common.command_line import deferred
from evotok_plugin.common.command_parser import examples_of
from llava_ext.commands.options import SharedOptions


def add(commands: argparse._SubParsersAction, shared: SharedOptions) -> None:
    parser = commands.add_parser(
        "export",
        epilog=examples_of(
            "evotok-llava export outputs/finetune -o shared --dtype bfloat16",
            "evotok-llava export outputs/finetune -o shared --remote-code",
            "evotok-llava export outputs/finetune_flat -o gguf --format gguf",
        ),
    )
    parser.add_argument("folder", help="a trained model or a checkpoint of a run")
    parser.add_argument("-o", "--output", required=True, help="new folder")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "float16", "bfloat16"),
        default="auto",
        help="dtype of the weights; auto keeps it, or is float32 for gguf; float16 only for gguf",
    )
    parser.add_argument(
        "--decoder_dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="dtype of the tokenizer's two decoders; the parts that choose codes stay float32",
    )
    parser.add_argument(
        "--format",
        choices=("evotok", "causal-lm", "gguf"),
        default="evotok",
        help="for models with the flat head, which then cannot read images: causal-lm, a folder that LLM servers load; "
        "gguf, a file for llama.cpp, of backbones of type qwen2 and llama",
    )
    parser.add_argument(
        "--remote-code",
        "--remote_code",
        action="store_true",
        help="add the code, so that transformers opens the folder with trust_remote_code=True and without this package",
    )
    parser.set_defaults(run=deferred("llava_ext.commands.export"))
