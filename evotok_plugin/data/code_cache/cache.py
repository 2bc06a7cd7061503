"""Images encoded once: a frozen tokenizer's codes on disk, so that what trains on them never runs its encoder.

`cache_files` describes the files. A run reads which shards exist and cuts the images that they lack into new ones. So
it may be killed at any moment, resumed with another number of processes, or find that its source has grown: the codes
of every image are in one shard. `cache_ledger` describes how an image is recognized.

N positions, L levels, K codes a level.
"""

import hashlib
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evotok_plugin.common.progress import progress_bar
from evotok_plugin.data.bad_samples import shorten
from evotok_plugin.data.code_cache.ledger import Ledger, stamps_of
from evotok_plugin.data.code_cache.shards import CacheFacts, Shard, remedy, shard_name
from evotok_plugin.data.files import content_digest
from evotok_plugin.data.keys import DigestIndex, key_digests
from evotok_plugin.data.sources import ImageSource
from evotok_plugin.errors import UserError

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
            UserError: no cache, one of another tokenizer (`EvoTokModel.fingerprint`) or image size (pixels), or one
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
            UserError: the cache does not hold it.
        """
        shard, row = self._place(self._held_row(key))
        return torch.from_numpy(self._shard_codes(shard)[row].astype(np.int64))

    def size_of(self, key: str) -> tuple[int, int]:
        """Width and height in pixels that the image had before it was resized and cropped.

        Raises:
            UserError: the cache does not hold it.
        """
        width, height = self._sizes[self._held_row(key)].tolist()
        return width, height

    def covers(self, keys: Iterable[str]) -> bool:
        """Whether every key is cached or known to be broken."""
        digests = key_digests(keys)
        return bool(((self._index.rows(digests) >= 0) | np.isin(digests, key_digests(self.broken))).all())

    def verify(self, show_progress: bool = False) -> list[str]:
        """Recompute all checksums; the names of the shards whose files are not as they were written."""
        numbers = progress_bar(self._numbers, desc="verifying", unit="shard", disable=not show_progress)
        return [shard_name(number) for number in numbers if not self._is_whole(number)]

    def verify_contents(self, source: ImageSource, show_progress: bool = False) -> list[str]:
        """Read all images of a source; the keys of those whose content is not the one that was encoded."""
        if not hasattr(source, "content"):
            return []
        ledger, indices = Ledger(self._folder), range(len(source))
        entries = ledger.entries_of(key_digests(map(source.key, indices)), stamps_of(source, indices))
        bar = progress_bar(indices, desc="comparing", unit="img", disable=not show_progress)
        changed = []
        for index in bar:
            row = ledger.rows[entries[index]] if entries[index] >= 0 else -1
            if row < 0:
                continue
            try:
                digest = content_digest(source.content(index))
            except UserError:
                digest = b""
            if row not in ledger.contents.all_rows(np.array([digest], "S16")):
                changed.append(source.key(index))
        return changed

    def _is_whole(self, number: int) -> bool:
        try:
            shard, checksum = Shard.read(self._folder, number)
            codes = self._load(number, len(shard.keys))
        except UserError:
            return False
        return checksum == shard.checksum() and hashlib.sha256(codes).hexdigest() == shard.codes_sha256

    def _held_row(self, key: str) -> int:
        rows = self._index.all_rows(key_digests([key]))
        if not len(rows):
            why = f"it is broken: {self.broken[key]}" if key in self.broken else "`evotok encode` adds what is new"
            raise UserError(f"code cache {str(self._folder)!r} holds no image {shorten(key)}; {why}")
        if len(rows) > 1:
            raise UserError(
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
            raise UserError(f"{str(path)!r} cannot be read: {error}; {remedy(number)}") from error
        if codes.dtype != np.uint16 or codes.shape != expected:
            raise UserError(f"{str(path)!r} holds {codes.dtype} {codes.shape}, not codes {expected}; {remedy(number)}")
        return codes

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # a mapped file would be pickled with all that is in it


# Writing -----------------------------------------------------------------------------------------------------
