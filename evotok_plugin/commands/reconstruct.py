"""`evotok reconstruct`: a picture of originals over reconstructions, and the PSNR of each image."""

import argparse
from pathlib import Path

import torch
from PIL.Image import Image

from evotok_plugin.commands.options import at_size
from evotok_plugin.common.files import check_output_file, writing
from evotok_plugin.common.pictures import image_grid, picture_suffixes, save_picture
from evotok_plugin.common.progress import progress_bar
from evotok_plugin.data.batches import decoded
from evotok_plugin.data.sources import open_sources
from evotok_plugin.errors import UserError
from evotok_plugin.metrics.image import psnr
from evotok_plugin.tokenizer_folder import open_tokenizer

_COLUMNS = 12
_BATCH_SIZE = 32


@torch.inference_mode()
def run(arguments: argparse.Namespace) -> None:
    """Write the picture, and print the PSNR of each image."""
    check_output_file(arguments.output, picture_suffixes())
    model, processor = open_tokenizer(arguments.model, arguments.device)
    processor = at_size(processor, model, arguments.size)
    source = open_sources(arguments.source)
    depth = model.config.pixel_depth if arguments.depth is None else arguments.depth
    num_batches = -(-len(source) // _BATCH_SIZE)
    batches = decoded(source, range(len(source)), processor, _BATCH_SIZE)
    originals: list[Image] = []
    rebuilt: list[Image] = []
    for batch in progress_bar(batches, total=num_batches, unit="batch", disable=num_batches <= 1):
        for reason in batch.broken.values():
            raise UserError(reason)
        pixel_values = batch.pixel_values
        codes = model.encode(pixel_values.to(model.device), depth=depth).codes
        assert codes is not None
        pixels = model.decode_pixels(codes).cpu()
        for index, score in zip(batch.indices, psnr(pixels, pixel_values).tolist(), strict=True):
            print(f"{source.key(index)}: PSNR {score:.2f} dB")
        originals += processor.to_pil(pixel_values)
        rebuilt += processor.to_pil(pixels)
    columns = min(_COLUMNS, len(originals))
    rows = []
    for start in range(0, len(originals), columns):
        rows += originals[start : start + columns] + rebuilt[start : start + columns]
    out = Path(arguments.output)
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    save_picture(image_grid(rows, columns, scale=max(1, 96 // originals[0].width)), out)
    print(out)
