"""Encode all images of a source into a code cache, resumably and over several processes."""

import logging
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from evotok_plugin.common.interruption import StopSignals
from evotok_plugin.common.processes import Processes
from evotok_plugin.common.progress import progress_bar
from evotok_plugin.data.bad_samples import BadSamples, shorten
from evotok_plugin.data.batches import IndexBatches, decoded_batches
from evotok_plugin.data.code_cache.cache import CodeCache
from evotok_plugin.data.code_cache.ledger import Ledger, stamps_of
from evotok_plugin.data.code_cache.lock import only_run, together
from evotok_plugin.data.code_cache.shards import CacheFacts
from evotok_plugin.data.code_cache.writer import ShardWriter
from evotok_plugin.data.keys import DigestIndex, key_digests
from evotok_plugin.data.sources import ImageSource
from evotok_plugin.errors import UserError
from evotok_plugin.image_processing_evotok import EvoTokImageProcessor, to_pixel_values
from evotok_plugin.modeling_evotok import EvoTokModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EncodingOptions:
    """How images are encoded.

    Attributes:
        shard_size: images a shard; what a killed process has of its last shard is encoded again.
        batch_size: images that the encoder sees at once.
        num_workers: processes that decode images while others are encoded; 0 decodes in between.
        max_bad_fraction: share of broken images tolerated.
        retry_broken: try images again that earlier runs could not read.

    Raises:
        UserError: a number out of its range.
    """

    shard_size: int = 4096
    batch_size: int = 64
    num_workers: int = 2
    max_bad_fraction: float = 0.001
    retry_broken: bool = False
    show_progress: bool = True

    def __post_init__(self) -> None:
        for name, least in (("shard_size", 1), ("batch_size", 1), ("num_workers", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 <= self.max_bad_fraction <= 1:
            raise UserError(f"max_bad_fraction is a share of all images, expected 0..1, got {self.max_bad_fraction}")


def encode_images(
    folder: str | Path,
    source: ImageSource,
    model: EvoTokModel,
    image_size: int,
    processes: Processes | None = None,
    options: EncodingOptions | None = None,
) -> CodeCache:
    """Add to a cache, or begin it, so that it holds the codes of every image of a source; all processes take part.

    Images that the cache holds, or has noted as broken, are not looked at again. SIGINT and SIGTERM end the run after
    the batch in hand, with what is encoded in the cache; a second one is obeyed at once.

    Args:
        model: in evaluation mode; it is moved to the processes' device.
        image_size: pixels a side that images are resized and cropped to.

    Raises:
        UserError: a key that occurs twice, a cache of another tokenizer or image size, one that is damaged, one that
            another run writes at the moment, or too many broken images. What is encoded stays.
        SystemExit: a signal ended the run.
    """
    assert not model.training, "a tokenizer in training mode would move its codebooks"
    folder, options = Path(folder), options or EncodingOptions()
    processes = processes or Processes(0, 1, model.device)
    facts = CacheFacts.of(model, image_size)
    request = _Request(source, options.retry_broken, processes)
    ledger, ended_by, report = _finished_ledger(folder, facts, request, processes), 0, None
    if ledger is None:
        with only_run(folder, facts, processes):
            run = _Run(folder, facts, request, processes, options)
            ended_by, ledger = run.encode(model), run.read_ledger()
        report = folder / "broken.jsonl" if processes.is_first else None
    elif processes.is_first:
        logger.info("code cache %s holds all %d images already", folder, len(source))
    entries = request.entries_in(ledger)
    num_done = int((entries >= 0).sum())
    if ended_by:
        if processes.is_first:
            logger.warning("stopped: %d of %d images are in %s; run again to go on", num_done, len(source), folder)
        raise SystemExit(128 + ended_by)
    cache = CodeCache._of(folder, facts, ledger, entries)
    _check_broken(cache, len(source), options.max_bad_fraction, report)
    assert num_done == len(source)
    return cache


class _Request:
    """The images that a cache shall hold.

    Attributes:
        keys, stamps: of each image (images,) the digest of its key, and its stamp.

    Raises:
        UserError: a key occurs twice.
    """

    def __init__(self, source: ImageSource, retry_broken: bool, processes: Processes) -> None:
        self.source, self._retry_broken = source, retry_broken
        self.keys = key_digests(source.key(index) for index in range(len(source)))
        if twice := DigestIndex(self.keys, np.arange(len(source))).repeated():
            first, second = sorted(twice)
            raise UserError(
                f"images {first} and {second} of {source.name!r} have the same key {shorten(source.key(first))}; "
                "keys must be unique, name every image once"
            )
        # Each process looks at a part, so that all agree on the state of files that change meanwhile.
        mine = np.array_split(np.arange(len(source)), processes.world_size)[processes.rank].tolist()
        self.stamps = np.concatenate(processes.gather(together(processes, lambda: stamps_of(source, mine))))

    def stamp(self, index: int) -> bytes:
        return bytes(self.stamps[index])

    def entries_in(self, ledger: Ledger) -> np.ndarray:
        """The entry of each image (images,), -1 where it has none."""
        return ledger.entries_of(self.keys, self.stamps)

    def left_in(self, ledger: Ledger) -> np.ndarray:
        """The images (indices) that are still to be encoded."""
        entries = self.entries_in(ledger)
        if self._retry_broken and len(ledger.rows):
            entries = np.where(ledger.rows[entries] >= 0, entries, -1)
        return np.flatnonzero(entries < 0)

    def num_broken_in(self, ledger: Ledger) -> int:
        """Number of images that could not be read, without those that are tried again."""
        entries = self.entries_in(ledger)
        return 0 if self._retry_broken else int((ledger.rows[entries[entries >= 0]] < 0).sum())

    def changed_in(self, ledger: Ledger, images: np.ndarray) -> np.ndarray:
        """Which images of the source (images,) are among `images` (indices) and in the cache in another state."""
        changed = np.zeros(len(self.keys), bool)
        is_new = self.entries_in(ledger)[images] < 0
        changed[images] = is_new & ledger.has_place(self.keys[images], self.stamps[images])
        return changed


def _finished_ledger(folder: Path, facts: CacheFacts, request: _Request, processes: Processes) -> Ledger | None:
    """The ledger, if nothing is left to do: many runs may begin at once on a finished cache, and nothing is written."""

    def read() -> Ledger | None:
        if not (folder / "cache.json").is_file():
            return None
        CacheFacts.read(folder).check(folder, facts.fingerprint, facts.image_size)
        return Ledger(folder)

    ledger = together(processes, read)
    is_finished = ledger is not None and not len(request.left_in(ledger))
    return ledger if all(processes.gather(is_finished)) else None


def _check_broken(cache: CodeCache, num_images: int, limit: float, report: Path | None) -> None:
    if report is not None:
        report.unlink(missing_ok=True)
    try:
        BadSamples(report, limit, dict(cache.broken)).check(num_images)
    except UserError as error:
        raise UserError(
            f"{error}. The encoded images are kept; run again after mending the broken ones (--retry_broken tries them "
            "even if their files have not changed)"
        ) from None


class _Run:
    """This process's part of the work: every `world_size`-th of the new shards, in step with the other processes."""

    def __init__(
        self, folder: Path, facts: CacheFacts, request: _Request, processes: Processes, options: EncodingOptions
    ) -> None:
        self._folder, self._facts, self._source = folder, facts, request.source
        self._processes, self._options = processes, options
        ledger = self.read_ledger()
        self._request, self._contents = request, ledger.contents
        self._todo = request.left_in(ledger)
        self._changed = request.changed_in(ledger, self._todo)
        self._known_broken = request.num_broken_in(ledger)
        self._first = max(ledger.numbers, default=-1) + 1
        if processes.is_first:
            num_images, num_left = len(self._source), len(self._todo)
            logger.info(
                "code cache %s: holds %d images, %d of %d of this source; %d to look at",
                *(folder, len(ledger.sizes), num_images - num_left, num_images, num_left),
            )

    def read_ledger(self) -> Ledger:
        """The ledger as it stands when all processes have written what they have."""
        self._processes.barrier()
        ledger = together(self._processes, lambda: Ledger(self._folder))
        if len(set(self._processes.gather((tuple(ledger.numbers), len(ledger.rows))))) > 1:
            raise UserError(
                f"the processes do not see the same files in {str(self._folder)!r}; put it where all machines share it "
                "(if it is there, run again: new files may have been slow to appear)"
            )
        return ledger

    def _shards_of(self, rank: int) -> dict[int, np.ndarray]:
        """Number and images of the new shards that a process writes."""
        size, stride = self._options.shard_size, self._processes.world_size
        starts = range(rank * size, len(self._todo), stride * size)
        return {self._first + start // size: self._todo[start : start + size] for start in starts}

    def encode(self, model: EvoTokModel) -> int:
        """Encode what is missing; returns the signal that ended it before, or 0."""
        # Nobody has more to do than the first process. The others keep step with it to the end, else a process that is
        # done would wait for longer than a collective operation may take.
        num_rounds = len(self._batches(self._shards_of(0)))
        if not num_rounds:
            return 0
        model.to(self._processes.device)
        shards = self._shards_of(self._processes.rank)
        processor = EvoTokImageProcessor(size=self._facts.image_size)
        batches = decoded_batches(
            self._source, self._batches(shards), processor, self._options.num_workers, known=self._contents
        )
        writer = ShardWriter(
            self._folder, self._facts, shards, self._source.key, self._request.stamp, changed=self._changed
        )
        most_broken = self._options.max_bad_fraction * len(self._source)
        seen, broken, known, changed, stop, started = 0, 0, 0, 0, 0, time.monotonic()
        with StopSignals() as signals, self._bar() as bar:
            for _ in range(num_rounds):
                if stop or self._known_broken + broken > most_broken:
                    break
                batch = next(batches, None)
                if batch is not None:
                    writer.add(batch, codes_of(batch.pixels, model) if batch.indices else None)
                progress = [writer.num_seen, writer.num_broken, writer.num_known, writer.num_changed, signals.caught]
                before = seen
                seen, broken, known, changed, stop = self._processes.add_up(torch.tensor(progress)).tolist()
                bar.update(seen - before)
            writer.close()
        if self._processes.is_first:
            seconds, encoded = time.monotonic() - started, seen - broken - known
            logger.info("encoded %d images in %.1f s, %.1f a second", encoded, seconds, encoded / seconds)
            if changed:
                logger.info("re-encoded %d of %d images whose content changed", changed, len(self._source))
            if known:
                logger.info("recognized %d of %d images by their content", known, len(self._source))
        return signals.caught or (signal.SIGTERM if stop else 0)

    def _batches(self, shards: dict[int, np.ndarray]) -> IndexBatches:
        """Batches that do not reach into the next shard."""
        return IndexBatches(list(shards.values()), self._options.batch_size)

    def _bar(self) -> tqdm:
        return progress_bar(
            desc="encoding",
            total=len(self._source),
            initial=len(self._source) - len(self._todo),
            unit="img",
            disable=not (self._options.show_progress and self._processes.is_first),
        )


@torch.inference_mode()
def codes_of(pixels: Tensor, model: EvoTokModel) -> np.ndarray:
    """Codes (B, N, L) in uint16 of images (B, 3, H, W) in uint8; the bytes go to the device, where they are scaled."""
    codes = model.encode(to_pixel_values(pixels, model.device).to(model.dtype)).codes
    return codes.cpu().numpy().astype(np.uint16)
