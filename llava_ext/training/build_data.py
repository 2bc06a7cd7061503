"""From the entries of `data_path` to what a stage trains on."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from evotok_plugin.common.processes import Processes
from evotok_plugin.data.code_cache.cache import CodeCache
from evotok_plugin.data.code_cache.encode import EncodingOptions, encode_images
from evotok_plugin.errors import UserError
from llava_ext.data.dataset import ConversationDataset
from llava_ext.data.mixture import Mixture, check_weights
from llava_ext.data.record_scan import RecordScan, scan_records
from llava_ext.data.record_sources import open_records
from llava_ext.data.record_table import RecordImages, RecordTable
from llava_ext.data.records import RowOptions
from llava_ext.modeling_evotok_llava import EvoTokLlavaForConditionalGeneration
from llava_ext.processing_evotok_llava import EvoTokLlavaProcessor
from llava_ext.training.config import StageConfig
from llava_ext.training.reports import StageReport, prepare_report
from llava_ext.training.samples import check_parts_have_samples

logger = logging.getLogger("llava_ext")


def build_dataset(
    config: StageConfig, model: EvoTokLlavaForConditionalGeneration, processor: EvoTokLlavaProcessor
) -> ConversationDataset:
    """Check the records, encode their images once, and leave out (by name) what is unusable.

    What is bad is written to `bad_samples.jsonl` and may not exceed `max_bad_fraction`; what is too long is written to
    `too_long_samples.jsonl` and only logged.

    Raises:
        UserError: no data, too much that is bad, nothing left, or nothing for a part of the model that is to train.
    """
    check_weights(config.data_weights, len(config.data_path))
    logging.getLogger("evotok_plugin.data").setLevel(
        logger.getEffectiveLevel()
    )  # skipped files, the state of the cache
    options = RowOptions(Path(config.image_folder) if config.image_folder else None, config.caption_task)
    sources = [open_records(path, options) for path in config.data_path]
    processes = Processes(config.process_index, config.world_size, config.device)
    found = scan_records(
        sources, processor, config.model_max_length, processes, _num_workers(config), not config.disable_tqdm
    )
    bad = StageReport(_report(config, "bad_samples"), config.max_bad_fraction, dict(found.bad))
    bad.check(found.num_records)
    tell_about_length(config, found, processor)
    check_parts_have_samples(model, config, found.records)  # before hours may go into encoding images
    records, cache = found.records, None
    if len(found.images):
        cache = open_code_cache(config, found.images, model, processor, processes)
        records = without_broken(found, cache, bad)
    if len(sources) > 1:
        tell_about_sources(config, records.sizes)
    if bad.reasons and processes.is_first:
        logger.warning(
            "left out %d of %d samples; see %s",
            len(bad.reasons),
            found.num_records,
            Path(config.output_dir) / "bad_samples.jsonl",
        )
    return ConversationDataset(
        records,
        processor,
        cache,
        config.model_max_length,
        config.prompt_dropout,
        seed=config.seed,
        mixture=Mixture(records.sizes, config.data_weights, config.seed),
    )


def _report(config: StageConfig, name: str) -> Path | None:
    """The path of a report that the first process writes; the reports of an old run stay until the new one begins."""
    return prepare_report(config.output_dir, f"{name}.jsonl") if config.process_index == 0 else None


def _num_workers(config: StageConfig) -> int:
    return config.dataloader_num_workers or EncodingOptions.num_workers


def tell_about_sources(config: StageConfig, sizes: Sequence[int]) -> None:
    """Say how many samples each entry of `data_path` has, and which share of the training they make."""
    weights = config.data_weights or sizes
    for path, size, weight in zip(config.data_path, sizes, weights, strict=True):
        logger.info("  %s: %d samples, %.1f %% of what is seen", path, size, 100 * weight / max(1, sum(weights)))


def tell_about_length(config: StageConfig, found: RecordScan, processor: EvoTokLlavaProcessor) -> None:
    """Say how many samples are cut and how many left out; long conversations are no reason to stop.

    Raises:
        UserError: nothing is left.
    """
    StageReport(_report(config, "too_long_samples"), 1.0, found.too_long).check(found.num_records)
    if (found.num_cut or found.too_long) and config.process_index == 0:
        logger.warning(
            "%d of %d samples are longer than model_max_length %d: %d lose their ends, %d are left out because an "
            "image or the whole answer would be cut (named in too_long_samples.jsonl)",
            found.num_cut + len(found.too_long),
            found.num_records,
            config.model_max_length,
            found.num_cut,
            len(found.too_long),
        )
    if not len(found.records):
        raise UserError(
            f"none of {found.num_records} samples fits model_max_length {config.model_max_length}; raise it "
            f"(an image takes {processor.image_steps(False)} steps to read, {processor.image_steps(True)} to draw)"
        )


def open_code_cache(
    config: StageConfig,
    images: RecordImages,
    model: EvoTokLlavaForConditionalGeneration,
    processor: EvoTokLlavaProcessor,
    processes: Processes,
) -> CodeCache:
    """The codes of all images; what is not on disk yet is encoded first, by all processes together."""
    options = EncodingOptions(
        num_workers=_num_workers(config),
        max_bad_fraction=1.0,  # the limit is a share of samples, and checked where they are counted
        show_progress=not config.disable_tqdm,
    )
    folder = config.code_cache or Path(config.output_dir) / "code_cache"
    return encode_images(folder, images, model.vision_tower.eval(), processor.image_processor.size, processes, options)


def without_broken(found: RecordScan, cache: CodeCache, bad: StageReport) -> RecordTable:
    """The records whose images could be read; the others go into `bad`.

    Raises:
        UserError: too many of them.
    """
    left_out = np.zeros(len(found.records), bool)
    for record, why in found.needing(cache.broken).items():
        left_out[record] = True
        bad.add(found.records.name(record), why)
    bad.check(found.num_records)
    return found.records.without(left_out)
