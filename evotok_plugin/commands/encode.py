"""`evotok encode`: the codes of images, as a cache on disk."""

import argparse
import logging

from evotok_plugin.commands.shared import SharedOptions, at_size, open_tokenizer
from evotok_plugin.common.files import check_output_folder
from evotok_plugin.data.code_cache import CodeCache, EncodingOptions, encode_images
from evotok_plugin.data.sources import open_sources
from evotok_plugin.processes import Processes


def add(commands: argparse._SubParsersAction, shared: SharedOptions) -> None:
    parser = commands.add_parser(
        "encode",
        parents=[shared.model, shared.counting, shared.sizing],
        help="write the codes of images into a cache; run again, it goes on where it was stopped",
    )
    defaults = EncodingOptions()
    parser.add_argument("source", nargs="*", help="images, folders, tar shards, parquet or hf:NAME")
    parser.add_argument("-o", "--output", default="codes", help="folder of the cache")
    parser.add_argument("--shard_size", type=int, default=defaults.shard_size, help="images a file")
    parser.add_argument("--batch_size", type=int, default=defaults.batch_size, help="images encoded at once")
    parser.add_argument("--num_workers", type=int, default=defaults.num_workers, help="processes that decode images")
    parser.add_argument("--retry_broken", action="store_true", help="try images again that could not be read before")
    parser.add_argument("--verify", action="store_true", help="recompute the checksums of all that the cache holds")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Encode what the cache lacks of the source; with --verify check the cache, too, or alone."""
    if not arguments.source and not arguments.verify:
        raise ValueError("nothing to encode: name images, folders, .tar, .parquet or hf:NAME (or pass --verify)")
    check_output_folder(arguments.output)
    processes = Processes.join(arguments.device)
    try:
        cache = _encode(arguments, processes) if arguments.source else CodeCache(arguments.output)
        if processes.is_first:
            _report(cache, arguments)
    finally:
        processes.leave()


def _encode(arguments: argparse.Namespace, processes: Processes) -> CodeCache:
    logging.getLogger("evotok_plugin").setLevel(logging.INFO if processes.is_first else logging.WARNING)
    options = EncodingOptions(
        shard_size=arguments.shard_size,
        batch_size=arguments.batch_size,
        num_workers=arguments.num_workers,
        max_bad_fraction=arguments.max_bad_fraction,
        retry_broken=arguments.retry_broken,
    )
    model, processor = open_tokenizer(arguments.model, str(processes.device))
    size = at_size(processor, model, arguments.size).size
    return encode_images(arguments.output, open_sources(arguments.source), model, size, processes, options)


def _report(cache: CodeCache, arguments: argparse.Namespace) -> None:
    positions, levels = cache.facts.num_positions, cache.facts.num_quantizers
    broken = f", {len(cache.broken)} broken" if cache.broken else ""
    print(f"{arguments.output}: {len(cache)} images{broken}, {positions} x {levels} codes each")
    if arguments.verify:
        if damaged := cache.verify(show_progress=True):
            raise ValueError(
                f"{len(damaged)} shards are not as they were written: {', '.join(damaged)}; delete the .npy and .json "
                "of each and encode again: their images alone are encoded again"
            )
        print("all checksums are right")
