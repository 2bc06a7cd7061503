"""`evotok-llava export`: write a self-contained model folder."""

import argparse

from evotok_plugin.common.files import check_output_folder
from evotok_plugin.common.folders import check_new_folder
from evotok_plugin.errors import UserError
from llava_ext.export.causal_lm import export_causal_lm
from llava_ext.export.gguf import export_gguf
from llava_ext.export.portable import export_model


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
