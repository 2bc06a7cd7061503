"""Reading a code cache: the codes of images that a frozen tokenizer has encoded once, by key.

N positions, L levels, K codes per level.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evotok_plugin.common.foreign_files import open_regular, reading
from evotok_plugin.common.progress import progress_bar
from evotok_plugin.data.bad_samples import shorten
from evotok_plugin.data.code_cache.ledger import Ledger
from evotok_plugin.data.code_cache.shards import CacheFacts, Shard, remedy, sha256_of, shard_name
from evotok_plugin.data.files import content_digest
from evotok_plugin.data.keys import DigestIndex, key_digests
from evotok_plugin.data.sources import ImageSource, stamps_of
from evotok_plugin.errors import UserError

_OPEN_SHARDS = 128  # each mapped file takes a file descriptor, and a process has about a thousand


class CodeCache:
    """Codes by key, memory-mapped. Data-loading processes can share one, by fork or by pickle.

    For a replaced image the cache returns the latest codes. If different images from several folders have the same key,
    `source` decides which one is meant; without it, looking up the key raises an error.

    Attributes:
        facts: the tokenizer that made the codes, and their shape.
        broken: reason by key of the images that could not be read.
    """

    def __init__(
        self,
        folder: str | Path,
        fingerprint: str | None = None,
        image_size: int | None = None,
        source: ImageSource | None = None,
    ) -> None:
        """Open the finished shards of a cache.

        Args:
            fingerprint: `EvoTokModel.fingerprint` of the expected tokenizer; None accepts any.
            image_size: expected image size in pixels; None accepts any.
            source: limits the cache to the images of this source in their current state.

        Raises:
            UserError: the folder is not a cache, belongs to another tokenizer or image size, or is damaged.
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
    def of_entries(cls, folder: Path, facts: CacheFacts, ledger: Ledger, entries: np.ndarray) -> "CodeCache":
        """Open a cache limited to some entries of its ledger, which has been read already."""
        cache = cls.__new__(cls)
        cache._folder, cache.facts = folder, facts
        cache._adopt(ledger, entries)
        return cache

    def _adopt(self, ledger: Ledger, entries: np.ndarray) -> None:
        entries = np.unique(entries[entries >= 0])
        encoded = entries[ledger.rows[entries] >= 0]
        self._open: dict[int, np.ndarray] = {}
        self._numbers, self._starts, self._sizes = ledger.numbers, ledger.row_starts, ledger.sizes
        self._index = DigestIndex(ledger.keys[encoded], ledger.rows[encoded])
        broken = entries[ledger.rows[entries] < 0]
        broken = broken[self._index.rows(ledger.keys[broken]) < 0]
        self.broken: dict[str, str] = dict(ledger.reasons[entry] for entry in broken.tolist())

    def __contains__(self, key: str) -> bool:
        return len(self._index.all_rows(key_digests([key]))) > 0

    def __len__(self) -> int:
        return len(self._index)

    def keys(self) -> Iterator[str]:
        """All keys, in the order in which they were written."""
        ledger = Ledger(self._folder)
        is_shown = ledger.first_of(self._index)
        for number, first in zip(ledger.numbers, ledger.entry_starts.tolist(), strict=False):
            keys = Shard.read(self._folder, number)[0].all_keys()
            yield from (key for key, shown in zip(keys, is_shown[first : first + len(keys)], strict=True) if shown)

    def codes(self, key: str) -> Tensor:
        """Codes (N, L) of one image, int64.

        Raises:
            UserError: the cache does not contain it.
        """
        shard, row = self._place(self._row_of(key))
        return torch.from_numpy(self._shard_codes(shard)[row].astype(np.int64))

    def size_of(self, key: str) -> tuple[int, int]:
        """Width and height of the image in pixels before it was resized and cropped.

        Raises:
            UserError: the cache does not contain it.
        """
        width, height = self._sizes[self._row_of(key)].tolist()
        return width, height

    def covers(self, keys: Iterable[str]) -> bool:
        """Whether every key is cached or known to be broken."""
        digests = key_digests(keys)
        return bool(((self._index.rows(digests) >= 0) | np.isin(digests, key_digests(self.broken))).all())

    def verify(self, show_progress: bool = False) -> list[str]:
        """Recompute all checksums; returns the names of damaged shards."""
        numbers = progress_bar(self._numbers, desc="verifying", unit="shard", disable=not show_progress)
        return [shard_name(number) for number in numbers if not self._is_whole(number)]

    def verify_contents(self, source: ImageSource, show_progress: bool = False) -> list[str]:
        """Read all images of a source; returns the keys of those whose content differs from the encoded one."""
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
        return checksum == shard.checksum() and sha256_of(codes) == shard.codes_sha256

    def _row_of(self, key: str) -> int:
        rows = self._index.all_rows(key_digests([key]))
        if not len(rows):
            why = f"it is broken: {self.broken[key]}" if key in self.broken else "add it with `evotok encode`"
            raise UserError(f"code cache {str(self._folder)!r} does not contain image {shorten(key)}; {why}")
        if len(rows) > 1:
            raise UserError(
                f"code cache {str(self._folder)!r} contains {len(rows)} different images named {shorten(key)}, from "
                "several folders; choose those of one source with `CodeCache(folder, source=...)`"
            )
        return int(rows[0])

    def _place(self, row: int) -> tuple[int, int]:
        """Position of a row's shard among all shards, and the row within that shard."""
        shard = int(np.searchsorted(self._starts, row, side="right")) - 1
        return shard, row - int(self._starts[shard])

    def _shard_codes(self, shard: int) -> np.ndarray:
        """Codes (images, N, L) of a shard, memory-mapped; the most recently used shards stay open."""
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
        with reading(path, remedy(number), "read"):
            open_regular(path).close()  # loading a pipe would wait for a writer
            codes = np.load(path, mmap_mode="r" if num_images else None, allow_pickle=False)
        if codes.dtype != np.uint16 or codes.shape != expected:
            raise UserError(
                f"{str(path)!r} contains {codes.dtype} {codes.shape}, expected uint16 {expected}; {remedy(number)}"
            )
        return codes

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # pickling a mapped array would copy its content
