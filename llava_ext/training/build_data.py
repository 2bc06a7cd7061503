"""From the entries of `data_path` to the data set that a stage trains on."""

import copy
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from evotok_plugin.data.bad_samples import shorten
from evotok_plugin.data.code_cache import CodeCache, EncodingOptions, encode_images
from evotok_plugin.errors import UserError
from llava_ext.data.dataset import ConversationDataset
from llava_ext.data.mixture import Mixture, check_weights
from llava_ext.data.record_scan import RecordScan, scan_records
from llava_ext.data.record_sources import open_records
from llava_ext.data.record_table import RecordImages, RecordTable
from llava_ext.data.records import KINDS, RowOptions
from llava_ext.modeling_evotok_llava import EvoTokLlavaForConditionalGeneration
from llava_ext.processing_evotok_llava import EvoTokLlavaProcessor
from llava_ext.training.config import StageConfig
from llava_ext.training.heldout import HeldOut, held_out
from llava_ext.training.sample_counts import check_groups_have_samples, counts_in_words
from llava_ext.training.sample_reports import StageReport, prepare_report

logger = logging.getLogger("llava_ext")


def build_heldout(
    config: StageConfig, model: EvoTokLlavaForConditionalGeneration, processor: EvoTokLlavaProcessor
) -> HeldOut:
    """The samples of `eval_data`; unusable ones are counted, but not listed.

    Raises:
        UserError: no usable data, too many unusable samples, or several image folders to choose from.
    """
    folders = [config.eval_image_folder] if config.eval_image_folder else config.image_folder
    if folders is not None and len(folders) > 1:
        raise UserError("image_folder names several folders; name that of eval_data with --eval_image_folder")
    other = copy.copy(config)
    other.data_path, other.data_weights, other.image_folder = list(config.eval_data or []), None, folders
    other.prompt_dropout = 0.0
    logger.info("held-out samples: %s", ", ".join(other.data_path))
    dataset = build_dataset(other, model, processor, is_heldout=True)
    logger.info("  %d held-out samples (%s), every %d steps", len(dataset), counts_in_words(dataset), config.eval_every)
    return held_out(dataset, processor)


def build_dataset(
    config: StageConfig,
    model: EvoTokLlavaForConditionalGeneration,
    processor: EvoTokLlavaProcessor,
    is_heldout: bool = False,
) -> ConversationDataset:
    """Check all records, encode their images once, and leave out unusable samples.

    Unusable samples are written to `bad_samples.jsonl` and must not exceed `max_bad_fraction`; samples that are too
    long are written to `too_long_samples.jsonl` and only logged.

    Args:
        is_heldout: whether nothing is trained on the samples; then no reports are written.

    Raises:
        UserError: no usable data, too many unusable samples, or no samples for a parameter group that is to train.
    """
    check_weights(config.data_weights, len(config.data_path))
    data_logger = logging.getLogger("evotok_plugin.data")  # skipped files, the state of the cache
    data_logger.setLevel(logger.getEffectiveLevel())
    sources = [open_records(path, options) for path, options in zip(config.data_path, row_options(config), strict=True)]
    processes = config.processes
    found = scan_records(
        sources, processor, config.model_max_length, processes, _num_workers(config), not config.disable_tqdm
    )
    report = None if is_heldout else _report(config, "bad_samples")
    bad = StageReport(report, config.max_bad_fraction, dict(found.bad))
    bad.check(found.num_records)
    log_lengths(config, found, processor, is_heldout)
    log_drawn_descriptions(config, found)
    if not is_heldout:
        check_groups_have_samples(model, config, found.records)  # before images are encoded, which may take hours
    records, cache = found.records, None
    if len(found.images):
        cache = open_code_cache(config, found.images, model, processor)
        records = drop_broken_images(found, cache, bad)
    if len(sources) > 1:
        log_sources(config, records.sizes)
    if bad.reasons and processes.is_first:
        listed = "" if is_heldout else f"; see {Path(config.output_dir) / 'bad_samples.jsonl'}"
        logger.warning("left out %d of %d samples%s", len(bad.reasons), found.num_records, listed)
    return ConversationDataset(
        records,
        processor,
        cache,
        config.model_max_length,
        config.prompt_dropout,
        seed=config.seed,
        mixture=Mixture(records.sizes, config.data_weights, config.seed),
    )


def row_options(config: StageConfig) -> list[RowOptions]:
    """The options of each entry of `data_path`.

    Raises:
        UserError: the number of image folders is neither 1 nor that of the entries.
    """
    given = [Path(folder) for folder in config.image_folder or []]
    if len(given) > 1 and len(given) != len(config.data_path):
        raise UserError(
            f"image_folder: expected one folder, or one for each of {len(config.data_path)} entries of data_path, got "
            f"{len(given)}"
        )
    first = given[0] if given else None
    folders = given if len(given) > 1 else [first] * len(config.data_path)
    root = Path(os.path.commonpath([os.path.abspath(folder) for folder in given])) if len(set(given)) > 1 else None
    return [RowOptions(folder, config.caption_task, config.draw_share, root) for folder in folders]


def _report(config: StageConfig, name: str) -> Path | None:
    """The path of a report, which only the first process writes."""
    return prepare_report(config.output_dir, f"{name}.jsonl") if config.processes.is_first else None


def _num_workers(config: StageConfig) -> int:
    return config.dataloader_num_workers or EncodingOptions.num_workers


def log_sources(config: StageConfig, sizes: Sequence[int]) -> None:
    """Log the number of samples of each entry of `data_path` and its share of the training."""
    weights = config.data_weights or sizes
    for path, size, weight in zip(config.data_path, sizes, weights, strict=True):
        logger.info("  %s: %d samples, %.1f %% of the training", path, size, 100 * weight / max(1, sum(weights)))


def log_lengths(
    config: StageConfig, found: RecordScan, processor: EvoTokLlavaProcessor, is_heldout: bool = False
) -> None:
    """Log how many samples are truncated and how many are left out because they are too long.

    Raises:
        UserError: no sample is left.
    """
    report = None if is_heldout else _report(config, "too_long_samples")
    StageReport(report, 1.0, found.too_long).check(found.num_records)
    if (found.num_cut or found.too_long) and config.processes.is_first:
        logger.warning(
            "%d of %d samples are longer than model_max_length %d: %d are truncated, %d are left out because an image "
            "or the whole answer would be cut off (see too_long_samples.jsonl)",
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


def log_drawn_descriptions(config: StageConfig, found: RecordScan) -> None:
    """Log how many conversations that describe an image also teach drawing, with examples."""
    if not config.draw_share:
        return
    reads = int((found.records.reads & (found.records.kinds == KINDS.index("read"))).sum())
    logger.info(
        "  %d read, %d draw the image of a description (draw_share %g of the conversations with one question that asks "
        "for a description; docs/data.md has the rule)",
        reads,
        found.num_from_descriptions,
        config.draw_share,
    )
    for example in found.examples:
        logger.info("    draw: %s", shorten(example))


def open_code_cache(
    config: StageConfig,
    images: RecordImages,
    model: EvoTokLlavaForConditionalGeneration,
    processor: EvoTokLlavaProcessor,
) -> CodeCache:
    """The codes of all images; all processes together first encode the images that the cache does not have."""
    options = EncodingOptions(
        num_workers=_num_workers(config),
        max_bad_fraction=1.0,  # the limit is a share of samples; `drop_broken_images` checks it
        show_progress=not config.disable_tqdm,
    )
    folder = config.code_cache or Path(config.output_dir) / "code_cache"
    tower, size = model.vision_tower.eval(), processor.image_processor.size
    return encode_images(folder, images, tower, size, config.processes, options)


def drop_broken_images(found: RecordScan, cache: CodeCache, bad: StageReport) -> RecordTable:
    """The records whose images could be read; the others are added to `bad`.

    Raises:
        UserError: there are too many unusable samples.
    """
    left_out = np.zeros(len(found.records), bool)
    for record, why in found.needing(cache.broken).items():
        left_out[record] = True
        bad.add(found.records.name(record), why)
    bad.check(found.num_records)
    return found.records.without(left_out)
