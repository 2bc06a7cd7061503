"""Images encoded once: a frozen tokenizer's codes on disk, so that what trains on them never runs its encoder.

A cache is a folder of

    cache.json          what the codes are: the tokenizer's fingerprint, the images' size, N, L and K
    shard-000042.npy    codes (images, N, L) in uint16
    shard-000042.json   their keys in order, the images' original sizes, what was broken, checksums

Every file is written under another name, synced and moved into place, a shard's .json last: a shard exists when its
.json does. Who encodes reads what shards exist, and cuts what they lack into new ones. So a run may be killed at any
moment, go on with another number of processes, or find that its source has grown: every image is in one shard.

N positions, L levels, K codes a level.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import re
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, BinaryIO, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from evotok_plugin.data.bad_samples import BadSamples
from evotok_plugin.data.images import as_bytes, to_pixel_values
from evotok_plugin.data.sources import ImageSource
from evotok_plugin.image_processing_evotok import EvoTokImageProcessor
from evotok_plugin.interruption import StopSignals, serve_the_parent
from evotok_plugin.modeling_evotok import EvoTokModel
from evotok_plugin.processes import Processes
from evotok_plugin.progress import progress_interval

logger = logging.getLogger(__name__)

T = TypeVar("T")

_FORMAT = 1
_OPEN_SHARDS = 128  # every mapped file costs a file descriptor, of which a process has about a thousand


@dataclass(frozen=True)
class CacheFacts:
    """What `cache.json` says: whose codes these are, and their sizes."""

    fingerprint: str
    image_size: int
    num_positions: int
    num_quantizers: int
    codebook_size: int
    format: int = _FORMAT

    @classmethod
    def of(cls, model: EvoTokModel, image_size: int) -> "CacheFacts":
        """The facts of codes that a tokenizer gives to square images of `image_size` pixels a side."""
        config = model.config
        num_positions = (image_size // config.patch_size) ** 2
        return cls(model.fingerprint(), image_size, num_positions, config.num_quantizers, config.codebook_size)

    @classmethod
    def read(cls, folder: Path) -> "CacheFacts":
        """Those of a cache.

        Raises:
            ValueError: the folder is no cache, or one of another format.
        """
        file = folder / "cache.json"
        if not file.is_file():
            raise ValueError(
                f"{str(folder)!r} holds no code cache (cache.json is missing); "
                f"`evotok encode SOURCE -o {folder}` writes one"
            )
        try:
            facts = cls(**json.loads(file.read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{str(file)!r} does not describe a code cache: {error}") from error
        if facts.format != _FORMAT:
            raise ValueError(f"code cache {str(folder)!r} has format {facts.format}, this version reads {_FORMAT}")
        return facts

    def check(self, folder: Path, fingerprint: str | None, image_size: int | None) -> None:
        """Refuse codes that are not the ones wanted; None wants any.

        Raises:
            ValueError: they are of another tokenizer or of images of another size.
        """
        wanted = (fingerprint or self.fingerprint, image_size or self.image_size)
        if wanted != (self.fingerprint, self.image_size):
            raise ValueError(
                f"code cache {str(folder)!r} was made by tokenizer {self.fingerprint[:12]} from images of "
                f"{self.image_size} pixels, wanted are codes of tokenizer {wanted[0][:12]} and {wanted[1]} pixels; "
                "choose another folder, or delete this one to have it made anew"
            )


# Shards ------------------------------------------------------------------------------------------------------


@dataclass
class _Shard:
    """The images of one shard: what its .json holds."""

    keys: list[str] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)
    codes_bytes: int = 0
    codes_sha256: str = ""

    def checksum(self) -> str:
        return hashlib.sha256(json.dumps(vars(self), sort_keys=True).encode()).hexdigest()

    def write(self, folder: Path, number: int, codes: np.ndarray) -> None:
        """Add the shard to the cache: codes (images, N, L) in uint16.

        Raises:
            ValueError: the file system does not take it.
        """
        self.codes_sha256 = hashlib.sha256(codes).hexdigest()
        try:
            stem = folder / _name(number)
            self.codes_bytes = _write(stem.with_suffix(".npy"), lambda file: np.save(file, codes, allow_pickle=False))
            record = {**vars(self), "sha256": self.checksum()}
            _write(stem.with_suffix(".json"), lambda file: file.write(json.dumps(record).encode()))
        except OSError as error:
            raise ValueError(
                f"shard {str(stem)!r} cannot be written: {error}; what is finished stays, run again to go on"
            ) from error

    @classmethod
    def read(cls, folder: Path, number: int) -> tuple["_Shard", str]:
        """A shard and the checksum that it was written with.

        Raises:
            ValueError: one of its files is not as it was written.
        """
        stem = folder / _name(number)
        try:
            record = json.loads(stem.with_suffix(".json").read_text())
            checksum = record.pop("sha256")
            shard = cls(**record)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{str(stem)}.json is not what was written ({error}); {_remedy(number)}") from error
        codes = stem.with_suffix(".npy")
        size = codes.stat().st_size if codes.exists() else 0
        if size != shard.codes_bytes:
            raise ValueError(f"{str(codes)!r} has {size} bytes, expected {shard.codes_bytes}; {_remedy(number)}")
        return shard, checksum


def _name(number: int) -> str:
    return f"shard-{number:06d}"


def _remedy(number: int) -> str:
    name = _name(number)
    return f"delete {name}.npy and {name}.json and run `evotok encode` again: their images alone are encoded again"


def _numbers(folder: Path) -> list[int]:
    """The shards that exist, in order."""
    found = (re.fullmatch(r"shard-(\d+)\.json", entry.name) for entry in os.scandir(folder))
    return sorted(int(match[1]) for match in found if match)


def _write(path: Path, write: Callable[[BinaryIO], Any]) -> int:
    """Write a file so that it is there whole or not at all, whatever happens; returns its size in bytes."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)  # the new name, too, must reach the disk before whatever comes next
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return size


# Reading -----------------------------------------------------------------------------------------------------


def _digests(keys: Iterable[str]) -> np.ndarray:
    """128 bits a key, (keys,)."""
    digests = (hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=16).digest() for key in keys)
    return np.fromiter(digests, dtype="S16")


class _KeyIndex:
    """In which row a key stands: sorted digests and the row of each.

    For the 13 M images of a large run a dict of strings takes more than 2 GB, and every forked data-loading process
    comes to own a copy, because looking at a string counts a reference. These arrays take 20 bytes a key and are
    shared. That two of 13 M keys have one digest has a probability of 1e-25.
    """

    def __init__(self, digests: np.ndarray) -> None:
        order = np.argsort(digests, kind="stable")
        self._digests, self._rows = digests[order], order.astype(np.uint32)

    def rows(self, digests: np.ndarray) -> np.ndarray:
        """Row of each (keys,), -1 where there is none."""
        if not len(self._digests):
            return np.full(len(digests), -1)
        places = np.searchsorted(self._digests, digests).clip(max=len(self._digests) - 1)
        return np.where(self._digests[places] == digests, self._rows[places].astype(np.int64), -1)

    def repeated(self) -> tuple[int, int] | None:
        """Two rows of one key, if there are any."""
        again = np.flatnonzero(self._digests[1:] == self._digests[:-1])
        return (int(self._rows[again[0]]), int(self._rows[again[0] + 1])) if len(again) else None


class CodeCache:
    """Codes by key, memory-mapped. Data-loading processes may share one, by fork or by pickle.

    Attributes:
        facts: whose codes they are, and their sizes.
        broken: reason by key of the images that could not be read.
    """

    def __init__(self, folder: str | Path, fingerprint: str | None = None, image_size: int | None = None) -> None:
        """Open what is finished of a cache.

        Raises:
            ValueError: no cache, one of another tokenizer (`EvoTokModel.fingerprint`) or image size (pixels), or one
                whose files are not as they were written.
        """
        self._folder = Path(folder)
        self.facts = CacheFacts.read(self._folder)
        self.facts.check(self._folder, fingerprint, image_size)
        self._numbers = _numbers(self._folder)
        self._open: dict[int, np.ndarray] = {}
        digests, sizes, broken = [_digests([])], [np.zeros((0, 2), np.uint32)], {}
        for number in self._numbers:
            shard, _ = _Shard.read(self._folder, number)
            digests.append(_digests(shard.keys))
            sizes.append(np.asarray(shard.sizes, np.uint32).reshape(-1, 2))
            broken |= shard.broken
        self._starts = np.cumsum([0, *map(len, digests[1:])])
        self._sizes = np.concatenate(sizes)
        self._index = _KeyIndex(np.concatenate(digests))
        if twice := self._index.repeated():
            first, second = (self._numbers[self._place(row)[0]] for row in sorted(twice))
            raise ValueError(f"{_name(first)} and {_name(second)} of {folder} hold the same images; {_remedy(second)}")
        held = self._index.rows(_digests(broken)) >= 0  # mended and encoded later
        self.broken: dict[str, str] = {
            key: broken[key] for key, is_held in zip(broken, held, strict=True) if not is_held
        }

    def __contains__(self, key: str) -> bool:
        return self._row(key) >= 0

    def __len__(self) -> int:
        return len(self._sizes)

    def keys(self) -> Iterator[str]:
        """All keys, shard after shard as they were written."""
        for number in self._numbers:
            yield from _Shard.read(self._folder, number)[0].keys

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
        return bool(self._has_seen(_digests(keys)).all())

    def verify(self, show_progress: bool = False) -> list[str]:
        """Recompute all checksums; the names of the shards whose files are not as they were written."""
        numbers = tqdm(
            self._numbers, desc="verifying", unit="shard", disable=not show_progress, mininterval=progress_interval()
        )
        return [_name(number) for number in numbers if not self._is_whole(number)]

    def _is_whole(self, number: int) -> bool:
        try:
            shard, checksum = _Shard.read(self._folder, number)
            codes = self._load(number, len(shard.keys))
        except ValueError:
            return False
        return checksum == shard.checksum() and hashlib.sha256(codes).hexdigest() == shard.codes_sha256

    def _row(self, key: str) -> int:
        return int(self._index.rows(_digests([key]))[0])

    def _held_row(self, key: str) -> int:
        row = self._row(key)
        if row < 0:
            why = f"it is broken: {self.broken[key]}" if key in self.broken else "`evotok encode` adds what is new"
            raise ValueError(f"code cache {str(self._folder)!r} holds no image {key!r}; {why}")
        return row

    def _has_seen(self, digests: np.ndarray, broken_too: bool = True) -> np.ndarray:
        """Which keys (keys,) are cached or known to be broken."""
        held = self._index.rows(digests) >= 0
        return held | np.isin(digests, _digests(self.broken)) if broken_too else held

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
        path = self._folder / f"{_name(number)}.npy"
        expected = (num_images, self.facts.num_positions, self.facts.num_quantizers)
        try:
            codes = np.load(path, mmap_mode="r" if num_images else None, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ValueError(f"{str(path)!r} cannot be read: {error}; {_remedy(number)}") from error
        if codes.dtype != np.uint16 or codes.shape != expected:
            raise ValueError(
                f"{str(path)!r} holds {codes.dtype} {codes.shape}, not codes {expected}; {_remedy(number)}"
            )
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
    request = _Request(source, options.retry_broken)
    cache, ended_by, report = _finished_cache(folder, facts, request, processes), 0, None
    if cache is None:
        with _only_run(folder, facts, processes):
            run = _Run(folder, facts, request, processes, options)
            ended_by, cache = run.encode(model), run.read_cache()
        report = folder / "broken.jsonl" if processes.is_first else None
    num_done = int(cache._has_seen(request.digests).sum())
    if ended_by:
        if processes.is_first:
            logger.warning("stopped: %d of %d images are in %s; run again to go on", num_done, len(source), folder)
        raise SystemExit(128 + ended_by)
    _check_broken(cache, request, options.max_bad_fraction, report)
    assert num_done == len(source)
    return cache


class _Request:
    """The images that a cache shall hold.

    Raises:
        ValueError: a key occurs twice.
    """

    def __init__(self, source: ImageSource, retry_broken: bool) -> None:
        self.source, self._retry_broken = source, retry_broken
        self.digests = _digests(source.key(index) for index in range(len(source)))
        self._index = _KeyIndex(self.digests)
        if twice := self._index.repeated():
            first, second = sorted(twice)
            raise ValueError(
                f"images {first} and {second} of {source.name!r} have the same key {source.key(first)!r}; "
                "keys must be unique, name every image once"
            )

    def left_in(self, cache: CodeCache) -> np.ndarray:
        """The images (indices) that are still to be encoded."""
        return np.flatnonzero(~cache._has_seen(self.digests, broken_too=not self._retry_broken))

    def broken_in(self, cache: CodeCache) -> dict[str, str]:
        """Reason by key of the images asked for that the cache could not read."""
        asked = self._index.rows(_digests(cache.broken)) >= 0
        return {key: why for (key, why), is_asked in zip(cache.broken.items(), asked, strict=True) if is_asked}


def _finished_cache(folder: Path, facts: CacheFacts, request: _Request, processes: Processes) -> CodeCache | None:
    """The cache, if nothing is left to do: many runs may begin at once on a finished one, and nothing is written."""

    def read() -> CodeCache | None:
        exists = (folder / "cache.json").is_file()
        return CodeCache(folder, facts.fingerprint, facts.image_size) if exists else None

    cache = _together(processes, read)
    is_finished = cache is not None and not len(request.left_in(cache))
    return cache if all(processes.gather(is_finished)) else None


def _check_broken(cache: CodeCache, request: _Request, limit: float, report: Path | None) -> None:
    if report is not None:
        report.unlink(missing_ok=True)
    try:
        BadSamples(report, limit, request.broken_in(cache)).check(len(request.source))
    except ValueError as error:
        raise ValueError(f"{error}. What is encoded stays; --retry_broken tries mended images again") from None


class _Run:
    """This process's part of the work: every `world_size`-th of the new shards, in step with the other processes."""

    def __init__(
        self, folder: Path, facts: CacheFacts, request: _Request, processes: Processes, options: EncodingOptions
    ) -> None:
        self._folder, self._facts, self._source = folder, facts, request.source
        self._processes, self._options = processes, options
        cache = self.read_cache()
        self._todo = request.left_in(cache)
        self._known_broken = 0 if options.retry_broken else len(request.broken_in(cache))
        self._first = max(cache._numbers, default=-1) + 1

    def read_cache(self) -> CodeCache:
        """The cache as it stands when all processes have written what they have."""
        self._processes.barrier()
        cache = _together(self._processes, lambda: CodeCache(self._folder))
        if len(set(self._processes.gather((tuple(cache._numbers), len(cache))))) > 1:
            raise ValueError(
                f"the processes do not see the same files in {str(self._folder)!r}; put it where all machines share it "
                "(if it is there, run again: new files may have been slow to appear)"
            )
        return cache

    def _shards_of(self, rank: int) -> dict[int, np.ndarray]:
        """Number and images of the new shards that a process writes."""
        size, stride = self._options.shard_size, self._processes.world_size
        starts = range(rank * size, len(self._todo), stride * size)
        return {self._first + start // size: self._todo[start : start + size] for start in starts}

    def encode(self, model: EvoTokModel) -> int:
        """Encode what is missing; returns the signal that ended it before, or 0."""
        # Nobody has more to do than the first process. The others keep step with it to the end, else a process that is
        # done would wait for longer than a collective operation may take.
        num_rounds = len(_Batches(self._shards_of(0), self._options.batch_size))
        if not num_rounds:
            return 0
        model.to(self._processes.device)
        shards = self._shards_of(self._processes.rank)
        batches = iter(self._loader(_Batches(shards, self._options.batch_size)))
        writer = _ShardWriter(self._folder, self._facts, shards)
        most_broken = self._options.max_bad_fraction * len(self._source)
        seen, broken, stop, started = 0, 0, 0, time.monotonic()
        with StopSignals() as signals, self._bar() as bar:
            for _ in range(num_rounds):
                if stop or self._known_broken + broken > most_broken:
                    break
                batch = next(batches, None)
                if batch is not None:
                    writer.add(batch, _codes_of(batch, model))
                progress = torch.tensor([writer.num_seen, writer.num_broken, signals.caught])
                before, (seen, broken, stop) = seen, self._processes.add_up(progress).tolist()
                bar.update(seen - before)
            writer.close()
        if self._processes.is_first:
            seconds = time.monotonic() - started
            logger.info("encoded %d images in %.1f s, %.1f a second", seen - broken, seconds, (seen - broken) / seconds)
        return signals.caught or (signal.SIGTERM if stop else 0)

    def _loader(self, batches: "_Batches") -> DataLoader:
        return DataLoader(
            _Pictures(self._source, EvoTokImageProcessor(size=self._facts.image_size)),
            batch_sampler=batches,
            collate_fn=_collate,
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


class _Batches:
    """Batches of images (indices), shard after shard; none reaches into the next shard."""

    def __init__(self, shards: dict[int, np.ndarray], batch_size: int) -> None:
        self._shards, self._batch_size = list(shards.values()), batch_size

    def __len__(self) -> int:
        return sum(-(-len(images) // self._batch_size) for images in self._shards)

    def __iter__(self) -> Iterator[list[int]]:
        for images in self._shards:
            for start in range(0, len(images), self._batch_size):
                yield images[start : start + self._batch_size].tolist()


@dataclass(frozen=True)
class _Picture:
    """An image as it goes to the encoder, uint8 (3, size, size), or why it cannot; `size` is (width, height)."""

    key: str
    pixels: Tensor | None = None
    size: tuple[int, int] = (0, 0)
    reason: str = ""


@dataclass(frozen=True)
class _Batch:
    """The whole pictures of a batch, pixels (B, 3, size, size) in uint8, and the broken ones."""

    pixels: Tensor | None
    keys: list[str]
    sizes: list[tuple[int, int]]
    broken: dict[str, str]


class _Pictures(Dataset):
    def __init__(self, source: ImageSource, processor: EvoTokImageProcessor) -> None:
        self._source, self._processor = source, processor

    def __getitem__(self, index: int) -> _Picture:
        key = self._source.key(index)
        try:
            picture = self._source.picture(index)
        except ValueError as error:
            return _Picture(key, reason=str(error))
        return _Picture(key, as_bytes(self._processor.crop(picture)), picture.size)


def _collate(pictures: Sequence[_Picture]) -> _Batch:
    whole = [picture for picture in pictures if picture.pixels is not None]
    return _Batch(
        pixels=torch.stack([picture.pixels for picture in whole]) if whole else None,
        keys=[picture.key for picture in whole],
        sizes=[picture.size for picture in whole],
        broken={picture.key: picture.reason for picture in pictures if picture.pixels is None},
    )


@torch.inference_mode()
def _codes_of(batch: _Batch, model: EvoTokModel) -> np.ndarray | None:
    """Codes (B, N, L) in uint16; pixels go to the device as bytes, in one piece."""
    if batch.pixels is None:
        return None
    codes = model.encode(to_pixel_values(batch.pixels, model.device).to(model.dtype)).codes
    return codes.cpu().numpy().astype(np.uint16)


class _ShardWriter:
    """Collects batches and writes a shard when all its images are there."""

    def __init__(self, folder: Path, facts: CacheFacts, shards: dict[int, np.ndarray]) -> None:
        self._folder, self._facts = folder, facts
        self._pending = {number: len(images) for number, images in shards.items()}
        self._shard, self._codes = _Shard(), []
        self.num_seen = self.num_broken = 0

    def add(self, batch: _Batch, codes: np.ndarray | None) -> None:
        """The next batch and its codes (B, N, L)."""
        shard = self._shard
        shard.keys += batch.keys
        shard.sizes += batch.sizes
        shard.broken |= batch.broken
        if codes is not None:
            self._codes.append(codes)
        self.num_seen += len(batch.keys) + len(batch.broken)
        self.num_broken += len(batch.broken)
        if len(shard.keys) + len(shard.broken) == next(iter(self._pending.values())):
            self.close()

    def close(self) -> None:
        """Write the shard in hand with what it has so far."""
        if self._shard.keys or self._shard.broken:
            number = next(iter(self._pending))
            del self._pending[number]
            empty = np.zeros((0, self._facts.num_positions, self._facts.num_quantizers), np.uint16)
            self._shard.write(self._folder, number, np.concatenate([empty, *self._codes]))
            self._shard, self._codes = _Shard(), []


# Processes, signals, locks -----------------------------------------------------------------------------------


def _together(processes: Processes, action: Callable[[], T]) -> T | None:
    """Do something in all processes; what goes wrong in one of them is raised in all, so that nobody waits for it."""
    result, problem = None, None
    try:
        result = action()
    except (ValueError, OSError) as error:
        problem = str(error)
    problems = [text for text in processes.gather(problem) if text]
    if problems:
        raise ValueError(problems[0])
    return result


@contextlib.contextmanager
def _only_run(folder: Path, facts: CacheFacts, processes: Processes) -> Iterator[None]:
    """Make the folder ready and keep other runs away from it.

    Every process holds its own byte of a lock file, and the first one begins by asking for all bytes: so a run whose
    first process was killed keeps others away until its last one is gone. Record locks, unlike `flock`'s, do not pass
    to data-loading processes, which may outlive a killed run.

    Raises:
        ValueError: another run holds the folder, it is no cache's, or one of other codes.
    """
    with contextlib.ExitStack() as held:

        def begin() -> None:
            file = held.enter_context(_locked(folder, start=0, length=0))
            _make_ready(folder, facts)
            fcntl.lockf(file, fcntl.LOCK_UN, 0, 1)  # all but the first byte

        def follow() -> None:
            held.enter_context(_locked(folder, start=processes.rank, length=1))

        _together(processes, begin if processes.is_first else lambda: None)
        _together(processes, follow if not processes.is_first else lambda: None)
        yield


def _locked(folder: Path, start: int, length: int) -> IO:
    """The lock file with bytes of it locked until it is closed; length 0 locks all that follow."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a")
    except OSError as error:
        raise ValueError(f"{str(folder)!r} cannot be made a code cache: {error}; choose another folder") from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
    except OSError as error:
        file.close()
        raise ValueError(
            f"another run is writing to {str(folder)!r} ({error.strerror}); wait until it has ended, or choose "
            "another folder"
        ) from error
    return file


def _make_ready(folder: Path, facts: CacheFacts) -> None:
    """Say what the cache is, if it is new, and remove what a killed run has left half-written."""
    if (folder / "cache.json").is_file():
        CacheFacts.read(folder).check(folder, facts.fingerprint, facts.image_size)
    elif next(folder.glob("shard-*"), None) is not None:
        raise ValueError(
            f"{str(folder)!r} holds shard files but no cache.json that says what they are; choose another folder"
        )
    else:
        _write(folder / "cache.json", lambda file: file.write(json.dumps(dataclasses.asdict(facts), indent=2).encode()))
    for path in folder.iterdir():
        orphan = re.fullmatch(r"shard-\d+\.npy", path.name) and not path.with_suffix(".json").exists()
        if orphan or re.fullmatch(r"(shard-\d+\.(npy|json)|cache\.json)\.tmp", path.name):
            path.unlink()
