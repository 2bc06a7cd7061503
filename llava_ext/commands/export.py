"""`evotok-llava export`: write a self-contained model folder."""

import argparse

from evotok_plugin.common.command_parser import examples_of
from evotok_plugin.common.files import check_output_folder
from evotok_plugin.common.folders import check_new_folder
from evotok_plugin.errors import UserError
from llava_ext.commands.options import SharedOptions
from llava_ext.export.causal_lm import export_causal_lm
from llava_ext.export.gguf import export_gguf
from llava_ext.export.portable import export_model


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
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Write a model folder that can be shared."""
    check_output_folder(arguments.output)
    check_new_folder(arguments.output)
    if arguments.remote_code and arguments.format != "evotok":
        raise UserError(f"--remote-code has no effect with --format {arguments.format}, which needs no code")
    if arguments.dtype == "float16" and arguments.format != "gguf":
        raise UserError("--dtype float16 is only for --format gguf; expected auto, float32 or bfloat16")
    if arguments.format == "causal-lm":
        export_causal_lm(arguments.folder, arguments.output, arguments.dtype)
    elif arguments.format == "gguf":
        export_gguf(arguments.folder, arguments.output, arguments.dtype)
    else:
        export_model(
            arguments.folder, arguments.output, arguments.dtype, arguments.decoder_dtype, arguments.remote_code
        )
    print(arguments.output)
