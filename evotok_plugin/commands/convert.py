"""`evotok convert`: convert a research checkpoint to a model folder, or a pickled weights file to safetensors."""

import argparse
import dataclasses
from pathlib import Path

from evotok_plugin.common.files import check_output_file, check_output_folder, write_whole
from evotok_plugin.common.recipes import load_recipe
from evotok_plugin.conversion.options import TokenizerOptions
from evotok_plugin.conversion.research_file import read_checkpoint
from evotok_plugin.conversion.tokenizer import convert_checkpoint


def run(arguments: argparse.Namespace) -> None:
    """Convert, and print a summary and the keys that were left out."""
    if arguments.output.endswith(".safetensors"):
        _rewrite(Path(arguments.checkpoint), Path(arguments.output))
        return
    check_output_folder(arguments.output, "output")
    names = [field.name for field in dataclasses.fields(TokenizerOptions)]
    given = {key: value for key, value in vars(arguments).items() if key in names}
    converted = convert_checkpoint(arguments.checkpoint, arguments.output, load_recipe(None, TokenizerOptions, given))
    config = converted.config
    print(
        f"{config.image_size}x{config.image_size} pixels, {config.encoder_num_layers} encoder layers, "
        f"{config.num_quantizers} levels x {config.codebook_size} codes x {config.codebook_dim}, "
        f"{len(converted.state)} weights"
    )
    for reason, count in converted.bookkeeping.items():
        print(f"left out: {count} keys, {reason}")
    print(arguments.output)


def _rewrite(checkpoint: Path, output: Path) -> None:
    """Write the tensors of a pickled file as safetensors, under the same names."""
    from safetensors.torch import save_file

    check_output_file(output, [".safetensors"])
    # Copies: safetensors rejects tensors that share memory.
    weights = {name: tensor.contiguous().clone() for name, tensor in read_checkpoint(checkpoint).items()}
    write_whole(output, lambda part: save_file(weights, part), shared=True)
    print(f"{len(weights)} weights")
    print(output)
