"""Writing a code cache: all images of a source are encoded, resumably and by several processes.

A run reads which shards exist and distributes the images that they lack over new ones. So it can be killed at any
moment, resumed with another number of processes, or rerun after its source has grown.
"""

import logging
import signal
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from evotok_plugin.common.interruption import StopSignals, stop_on_signals
from evotok_plugin.common.processes import Processes
from evotok_plugin.common.progress import progress_bar
from evotok_plugin.common.run_lock import together
from evotok_plugin.data.bad_samples import BadSamples, shorten
from evotok_plugin.data.batches import IndexBatches, decoded_batches
from evotok_plugin.data.code_cache.cache import CodeCache
from evotok_plugin.data.code_cache.ledger import Ledger
from evotok_plugin.data.code_cache.lock import only_run
from evotok_plugin.data.code_cache.shards import CacheFacts
from evotok_plugin.data.code_cache.writer import ShardWriter
from evotok_plugin.data.encoding_options import EncodingOptions
from evotok_plugin.data.keys import DigestIndex, key_digests
from evotok_plugin.data.sources import ImageSource, stamps_of
from evotok_plugin.errors import UserError
from evotok_plugin.image_processing_evotok import EvoTokImageProcessor, to_pixel_values
from evotok_plugin.modeling_evotok import EvoTokModel

logger = logging.getLogger(__name__)


@stop_on_signals()
def encode_images(
    folder: str | Path,
    source: ImageSource,
    model: EvoTokModel,
    image_size: int,
    processes: Processes | None = None,
    options: EncodingOptions | None = None,
) -> CodeCache:
    """Create or extend a cache so that it contains the codes of every image of a source; all processes take part.

    Images that the cache contains, or has recorded as broken, are skipped. SIGINT, SIGTERM and SIGHUP stop the run
    after the current batch, with everything encoded so far in the cache; a second signal takes effect immediately.

    Args:
        model: in evaluation mode; it is moved to the processes' device.
        image_size: pixels per side to which images are resized and cropped.

    Raises:
        UserError: a key occurs twice; the cache is damaged, belongs to another tokenizer or image size, or is being
            written by another run; or too many images are broken. Encoded images are kept.
        SystemExit: a signal stopped the run.
    """
    assert not model.training, "a tokenizer in training mode would update its codebooks"
    folder, options = Path(folder), options or EncodingOptions()
    processes = processes or Processes(0, 1, model.device)
    facts = CacheFacts.of(model, image_size)
    request = _Request(source, options.retry_broken, processes)
    ledger = _finished_ledger(folder, facts, request, processes)
    stopped_by, report = 0, None
    if ledger is None:
        with only_run(folder, facts, processes):
            run = _Run(folder, facts, request, processes, options)
            stopped_by, ledger = run.encode(model), run.read_ledger()
        report = folder / "broken.jsonl" if processes.is_first else None
    elif processes.is_first:
        logger.info("code cache %s already contains all %d images", folder, len(source))
    entries = request.entries_in(ledger)
    num_done = int((entries >= 0).sum())
    if stopped_by:
        if processes.is_first:
            logger.warning("stopped: %d of %d images are in %s; run again to resume", num_done, len(source), folder)
        raise SystemExit(128 + stopped_by)
    cache = CodeCache.of_entries(folder, facts, ledger, entries)
    _check_broken(cache, len(source), options.max_bad_fraction, report)
    assert num_done == len(source)
    return cache


class _Request:
    """The images that a cache is to contain.

    Attributes:
        keys, stamps: digest of the key, and stamp, of each image (images,).

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
                "keys must be unique; list every image only once"
            )
        # Each process checks a part, so that all agree on the state of files that change in the meantime.
        mine = np.array_split(np.arange(len(source)), processes.world_size)[processes.rank].tolist()
        self.stamps = np.concatenate(processes.gather(together(processes, lambda: stamps_of(source, mine))))

    def stamp(self, index: int) -> bytes:
        """Stamp of an image when the run started."""
        return bytes(self.stamps[index])

    def entries_in(self, ledger: Ledger) -> np.ndarray:
        """Entry of each image (images,), -1 where it has none."""
        return ledger.entries_of(self.keys, self.stamps)

    def left_in(self, ledger: Ledger) -> np.ndarray:
        """Indices of the images that are still to be encoded."""
        entries = self.entries_in(ledger)
        if self._retry_broken and len(ledger.rows):
            entries = np.where(ledger.rows[entries] >= 0, entries, -1)
        return np.flatnonzero(entries < 0)

    def num_broken_in(self, ledger: Ledger) -> int:
        """Number of images that could not be read, excluding those that will be retried."""
        entries = self.entries_in(ledger)
        return 0 if self._retry_broken else int((ledger.rows[entries[entries >= 0]] < 0).sum())

    def changed_in(self, ledger: Ledger, images: np.ndarray) -> np.ndarray:
        """Mask (images,) of those of `images` (indices) that the cache contains in an earlier state."""
        changed = np.zeros(len(self.keys), bool)
        is_new = self.entries_in(ledger)[images] < 0
        changed[images] = is_new & ledger.has_place(self.keys[images], self.stamps[images])
        return changed


def _finished_ledger(folder: Path, facts: CacheFacts, request: _Request, processes: Processes) -> Ledger | None:
    """The ledger if nothing is left to encode, otherwise None.

    Nothing is written, so many runs can use a finished cache at the same time.
    """

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
            f"{error}. The encoded images are kept; repair the broken ones and run again (--retry_broken also retries "
            "files that have not changed)"
        ) from None


class _Run:
    """One process's part of the work: every `world_size`-th new shard, in lockstep with the other processes."""

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
                "code cache %s contains %d images, %d of %d from this source; %d to read",
                *(folder, len(ledger.sizes), num_images - num_left, num_images, num_left),
            )

    def read_ledger(self) -> Ledger:
        """Read the ledger after all processes have written their shards."""
        self._processes.barrier()
        ledger = together(self._processes, lambda: Ledger(self._folder))
        if len(set(self._processes.gather((tuple(ledger.numbers), len(ledger.rows))))) > 1:
            raise UserError(
                f"the processes see different files in {str(self._folder)!r}; use a folder that all machines share (if "
                "it is shared, run again: new files may have been slow to appear)"
            )
        return ledger

    def _shards_of(self, rank: int) -> dict[int, np.ndarray]:
        """Images of the new shards that a process writes, by shard number."""
        size, stride = self._options.shard_size, self._processes.world_size
        starts = range(rank * size, len(self._todo), stride * size)
        return {self._first + start // size: self._todo[start : start + size] for start in starts}

    def encode(self, model: EvoTokModel) -> int:
        """Encode the missing images; returns the signal that stopped it early, or 0."""
        # No process has more work than the first one. The others keep in step with it to the end; otherwise a process
        # that has finished would wait longer than the timeout of a collective operation.
        num_rounds = len(self._batches(self._shards_of(0)))
        if not num_rounds:
            return 0
        model.to(self._processes.device)  # type: ignore[arg-type]  # transformers' decorator hides the signature
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
            logger.info("encoded %d images in %.1f s, %.1f per second", encoded, seconds, encoded / seconds)
            if changed:
                logger.info("re-encoded %d of %d images whose content changed", changed, len(self._source))
            if known:
                logger.info("recognized %d of %d images by their content", known, len(self._source))
        return signals.caught or (signal.SIGTERM if stop else 0)

    def _batches(self, shards: dict[int, np.ndarray]) -> IndexBatches:
        """Batches of images; no batch spans two shards."""
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
    """Encode images (B, 3, H, W) in uint8 to codes (B, N, L) in uint16; pixels are scaled on the model's device."""
    codes = model.encode(to_pixel_values(pixels, model.device).to(model.dtype)).codes
    assert codes is not None
    return codes.cpu().numpy().astype(np.uint16)
