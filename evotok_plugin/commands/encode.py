"""`evotok encode`: write the codes of images into a cache on disk."""

import argparse
import logging

from evotok_plugin.commands.options import at_size
from evotok_plugin.common.files import check_output_folder
from evotok_plugin.common.processes import Processes
from evotok_plugin.data.bad_samples import shorten
from evotok_plugin.data.code_cache import CodeCache, EncodingOptions, encode_images
from evotok_plugin.data.sources import ImageSource, open_sources
from evotok_plugin.errors import UserError
from evotok_plugin.tokenizer_folder import open_tokenizer


def run(arguments: argparse.Namespace) -> None:
    """Encode the images that the cache lacks; with --verify also check the cache, without a source only that."""
    if not arguments.source and not arguments.verify:
        raise UserError("nothing to encode: name images, folders, .tar, .parquet or hf:NAME (or pass --verify)")
    check_output_folder(arguments.output)
    processes = Processes.join(arguments.device)
    logging.getLogger("evotok_plugin").setLevel(logging.INFO if processes.is_first else logging.ERROR)
    try:
        source = open_sources(arguments.source) if arguments.source else None
        if source is not None:
            _encode(source, arguments, processes)
        if processes.is_first:
            _report(CodeCache(arguments.output), source, arguments)
    finally:
        processes.leave()


def _encode(source: ImageSource, arguments: argparse.Namespace, processes: Processes) -> None:
    options = EncodingOptions(
        shard_size=arguments.shard_size,
        batch_size=arguments.batch_size,
        num_workers=arguments.num_workers,
        max_bad_fraction=arguments.max_bad_fraction,
        retry_broken=arguments.retry_broken,
    )
    model, processor = open_tokenizer(arguments.model, str(processes.device))
    size = at_size(processor, model, arguments.size).size
    encode_images(arguments.output, source, model, size, processes, options)


def _report(cache: CodeCache, source: ImageSource | None, arguments: argparse.Namespace) -> None:
    positions, levels = cache.facts.num_positions, cache.facts.num_quantizers
    broken = f", {len(cache.broken)} broken" if cache.broken else ""
    print(f"{arguments.output}: {len(cache)} images{broken}, {positions} x {levels} codes each")
    if arguments.verify:
        if damaged := cache.verify(show_progress=True):
            raise UserError(
                f"{arguments.output}: {len(damaged)} shards are damaged: {', '.join(damaged)}; delete the .npy and "
                ".json of each and encode again: only their images are re-encoded"
            )
        print("all checksums match")
        if source is not None and (changed := cache.verify_contents(source, show_progress=True)):
            raise UserError(
                f"{len(changed)} images have changed since they were encoded, without a change of size or time: "
                f"{', '.join(map(shorten, changed[:3]))}; touch their files and encode again"
            )
