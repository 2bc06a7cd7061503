"""Images encoded once: a frozen tokenizer's codes on disk, so that what trains on them never runs its encoder.

`cache_files` describes the files. A run reads which shards exist and cuts the images that they lack into new ones. So
it may be killed at any moment, resumed with another number of processes, or find that its source has grown: the codes
of every image are in one shard. `cache_ledger` describes how an image is recognized.

N positions, L levels, K codes a level.
"""

import hashlib
import logging
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from evotok_plugin.common.interruption import StopSignals, serve_the_parent
from evotok_plugin.common.processes import Processes
from evotok_plugin.common.progress import progress_interval
from evotok_plugin.data.bad_samples import BadSamples, shorten
from evotok_plugin.data.cache_files import CacheFacts, Shard, remedy, shard_name
from evotok_plugin.data.cache_ledger import DigestIndex, Ledger, key_digests, stamps_of
from evotok_plugin.data.cache_lock import only_run, together
from evotok_plugin.data.files import content_digest
from evotok_plugin.data.image_batches import Batches, Pictures, ShardWriter, codes_of, collate
from evotok_plugin.data.sources import ImageSource
from evotok_plugin.image_processing_evotok import EvoTokImageProcessor
from evotok_plugin.modeling_evotok import EvoTokModel

logger = logging.getLogger(__name__)

_OPEN_SHARDS = 128  # every mapped file costs a file descriptor, of which a process has about a thousand


# Reading -----------------------------------------------------------------------------------------------------


class CodeCache:
    """Codes by key, memory-mapped. Data-loading processes may share one, by fork or by pickle.

    Of an image that was replaced the cache gives the last codes. Where different images of several folders have one
    key, it gives codes of the one that `source` holds, and without `source` raises an error.

    Attributes:
        facts: whose codes they are, and their sizes.
        broken: reason by key of the images that could not be read.
    """

    def __init__(
        self,
        folder: str | Path,
        fingerprint: str | None = None,
        image_size: int | None = None,
        source: ImageSource | None = None,
    ) -> None:
        """Open the finished part of a cache.

        Args:
            source: limits the cache to the images of this source, as they are now.

        Raises:
            ValueError: no cache, one of another tokenizer (`EvoTokModel.fingerprint`) or image size (pixels), or one
                whose files are not as they were written.
        """
        self._folder = Path(folder)
        self.facts = CacheFacts.read(self._folder)
        self.facts.check(self._folder, fingerprint, image_size)
        ledger = Ledger(self._folder)
        if source is None:
            chosen = ledger.current()
        else:
            indices = range(len(source))
            chosen = ledger.entries_of(key_digests(map(source.key, indices)), stamps_of(source, indices))
        self._adopt(ledger, chosen)

    @classmethod
    def _of(cls, folder: Path, facts: CacheFacts, ledger: Ledger, entries: np.ndarray) -> "CodeCache":
        """The cache of chosen entries."""
        cache = cls.__new__(cls)
        cache._folder, cache.facts = folder, facts
        cache._adopt(ledger, entries)
        return cache

    def _adopt(self, ledger: Ledger, entries: np.ndarray) -> None:
        entries = np.unique(entries[entries >= 0])
        held = entries[ledger.rows[entries] >= 0]
        self._open: dict[int, np.ndarray] = {}
        self._numbers, self._starts, self._sizes = ledger.numbers, ledger.row_starts, ledger.sizes
        self._index = DigestIndex(ledger.keys[held], ledger.rows[held])
        broken = entries[ledger.rows[entries] < 0]
        broken = broken[self._index.rows(ledger.keys[broken]) < 0]
        self.broken: dict[str, str] = dict(ledger.reasons[entry] for entry in broken.tolist())

    def __contains__(self, key: str) -> bool:
        return len(self._index.all_rows(key_digests([key]))) > 0

    def __len__(self) -> int:
        return len(self._index)

    def keys(self) -> Iterator[str]:
        """All keys, shard after shard as they were written."""
        ledger = Ledger(self._folder)
        is_shown = ledger.first_of(self._index)
        for number, first in zip(ledger.numbers, ledger.entry_starts.tolist(), strict=False):
            keys = Shard.read(self._folder, number)[0].all_keys()
            yield from (key for key, shown in zip(keys, is_shown[first : first + len(keys)], strict=True) if shown)

    def codes(self, key: str) -> Tensor:
        """Codes (N, L) of one image, int64.

        Raises:
            ValueError: the cache does not hold it.
        """
        shard, row = self._place(self._held_row(key))
        return torch.from_numpy(self._shard_codes(shard)[row].astype(np.int64))

    def size_of(self, key: str) -> tuple[int, int]:
        """Width and height in pixels that the image had before it was resized and cropped.

        Raises:
            ValueError: the cache does not hold it.
        """
        width, height = self._sizes[self._held_row(key)].tolist()
        return width, height

    def covers(self, keys: Iterable[str]) -> bool:
        """Whether every key is cached or known to be broken."""
        digests = key_digests(keys)
        return bool(((self._index.rows(digests) >= 0) | np.isin(digests, key_digests(self.broken))).all())

    def verify(self, show_progress: bool = False) -> list[str]:
        """Recompute all checksums; the names of the shards whose files are not as they were written."""
        numbers = tqdm(
            self._numbers, desc="verifying", unit="shard", disable=not show_progress, mininterval=progress_interval()
        )
        return [shard_name(number) for number in numbers if not self._is_whole(number)]

    def verify_contents(self, source: ImageSource, show_progress: bool = False) -> list[str]:
        """Read all images of a source; the keys of those whose content is not the one that was encoded."""
        if not hasattr(source, "content"):
            return []
        ledger, indices = Ledger(self._folder), range(len(source))
        entries = ledger.entries_of(key_digests(map(source.key, indices)), stamps_of(source, indices))
        bar = tqdm(indices, desc="comparing", unit="img", disable=not show_progress, mininterval=progress_interval())
        changed = []
        for index in bar:
            row = ledger.rows[entries[index]] if entries[index] >= 0 else -1
            if row < 0:
                continue
            try:
                digest = content_digest(source.content(index))
            except ValueError:
                digest = b""
            if row not in ledger.contents.all_rows(np.array([digest], "S16")):
                changed.append(source.key(index))
        return changed

    def _is_whole(self, number: int) -> bool:
        try:
            shard, checksum = Shard.read(self._folder, number)
            codes = self._load(number, len(shard.keys))
        except ValueError:
            return False
        return checksum == shard.checksum() and hashlib.sha256(codes).hexdigest() == shard.codes_sha256

    def _held_row(self, key: str) -> int:
        rows = self._index.all_rows(key_digests([key]))
        if not len(rows):
            why = f"it is broken: {self.broken[key]}" if key in self.broken else "`evotok encode` adds what is new"
            raise ValueError(f"code cache {str(self._folder)!r} holds no image {shorten(key)}; {why}")
        if len(rows) > 1:
            raise ValueError(
                f"code cache {str(self._folder)!r} holds {len(rows)} different images of the name {shorten(key)}, of "
                "several folders; open it with `CodeCache(folder, source=...)` for those of one source"
            )
        return int(rows[0])

    def _place(self, row: int) -> tuple[int, int]:
        """Position of the row's shard among the shards, and the row within it."""
        shard = int(np.searchsorted(self._starts, row, side="right")) - 1
        return shard, row - int(self._starts[shard])

    def _shard_codes(self, shard: int) -> np.ndarray:
        """A shard's codes (images, N, L), mapped; those used last stay open."""
        codes = self._open.pop(shard, None)
        if codes is None:
            codes = self._load(self._numbers[shard], int(self._starts[shard + 1] - self._starts[shard]))
        self._open[shard] = codes
        if len(self._open) > _OPEN_SHARDS:
            self._open.pop(next(iter(self._open)), None)
        return codes

    def _load(self, number: int, num_images: int) -> np.ndarray:
        path = self._folder / f"{shard_name(number)}.npy"
        expected = (num_images, self.facts.num_positions, self.facts.num_quantizers)
        try:
            codes = np.load(path, mmap_mode="r" if num_images else None, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ValueError(f"{str(path)!r} cannot be read: {error}; {remedy(number)}") from error
        if codes.dtype != np.uint16 or codes.shape != expected:
            raise ValueError(f"{str(path)!r} holds {codes.dtype} {codes.shape}, not codes {expected}; {remedy(number)}")
        return codes

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # a mapped file would be pickled with all that is in it


# Writing -----------------------------------------------------------------------------------------------------


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
        ValueError: a number out of its range.
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
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction is a share of all images, expected 0..1, got {self.max_bad_fraction}")


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
        ValueError: a key that occurs twice, a cache of another tokenizer or image size, one that is damaged, one that
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
        ValueError: a key occurs twice.
    """

    def __init__(self, source: ImageSource, retry_broken: bool, processes: Processes) -> None:
        self.source, self._retry_broken = source, retry_broken
        self.keys = key_digests(source.key(index) for index in range(len(source)))
        if twice := DigestIndex(self.keys, np.arange(len(source))).repeated():
            first, second = sorted(twice)
            raise ValueError(
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
    except ValueError as error:
        raise ValueError(
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
            raise ValueError(
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
        num_rounds = len(Batches(self._shards_of(0), self._options.batch_size))
        if not num_rounds:
            return 0
        model.to(self._processes.device)
        shards = self._shards_of(self._processes.rank)
        batches = iter(self._loader(Batches(shards, self._options.batch_size)))
        writer = ShardWriter(self._folder, self._facts, shards, self._request.stamp, self._changed)
        most_broken = self._options.max_bad_fraction * len(self._source)
        seen, broken, known, changed, stop, started = 0, 0, 0, 0, 0, time.monotonic()
        with StopSignals() as signals, self._bar() as bar:
            for _ in range(num_rounds):
                if stop or self._known_broken + broken > most_broken:
                    break
                batch = next(batches, None)
                if batch is not None:
                    writer.add(batch, codes_of(batch, model))
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

    def _loader(self, batches: Batches) -> DataLoader:
        return DataLoader(
            Pictures(self._source, EvoTokImageProcessor(size=self._facts.image_size), self._contents),
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=min(self._options.num_workers, len(batches)),
            worker_init_fn=serve_the_parent,
            generator=torch.Generator(),  # else it would draw from the random numbers of whoever trains next
        )

    def _bar(self) -> tqdm:
        return tqdm(
            desc="encoding",
            total=len(self._source),
            initial=len(self._source) - len(self._todo),
            unit="img",
            disable=not (self._options.show_progress and self._processes.is_first),
            mininterval=progress_interval(),
        )
