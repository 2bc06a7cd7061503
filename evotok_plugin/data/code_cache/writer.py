"""The writer of a code cache's shards: collects encoded batches until a shard is complete."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from evotok_plugin.data.batches import ImageBatch
from evotok_plugin.data.code_cache.shards import CacheFacts, Shard
from evotok_plugin.data.keys import as_hex


class ShardWriter:
    """Collects batches and writes a shard as soon as all its images have arrived.

    Attributes:
        num_seen, num_known, num_broken, num_changed: images so far: all; those recognized by their content; those that
            cannot be read; those encoded because their content has changed.
    """

    def __init__(
        self,
        folder: Path,
        facts: CacheFacts,
        shards: dict[int, np.ndarray],
        key_of: Callable[[int], str],
        stamp_of: Callable[[int], bytes],
        changed: np.ndarray,
    ) -> None:
        """
        Args:
            shards: the images (indices) of each shard by its number, in the order in which they arrive.
            key_of, stamp_of: key and stamp of an image, by index.
            changed: for each image of the source (images,), whether the cache holds an earlier state of it.
        """
        self._folder, self._facts, self._changed = folder, facts, changed
        self._key_of, self._stamp_of = key_of, stamp_of
        self._pending = {number: len(images) for number, images in shards.items()}
        self._shard = Shard()
        self._codes: list[np.ndarray] = []
        self.num_seen = self.num_known = self.num_broken = self.num_changed = 0

    def add(self, batch: ImageBatch, codes: np.ndarray | None) -> None:
        """Add the next batch and the codes (B, N, L) of its decoded images; None if it has no decoded images."""
        shard = self._shard
        shard.keys += self._keys(batch.indices)
        shard.sizes += batch.sizes
        shard.stamps += self._stamps(batch.indices)
        shard.contents += [as_hex(batch.digests[index]) for index in batch.indices]
        shard.known_keys += self._keys(batch.recognized)
        shard.known_stamps += self._stamps(batch.recognized)
        shard.known_contents += [as_hex(batch.digests[index]) for index in batch.recognized]
        shard.broken |= {self._key_of(index): reason for index, reason in batch.broken.items()}
        shard.broken_stamps += self._stamps(list(batch.broken))
        if codes is not None:
            self._codes.append(codes)
        self.num_seen += len(batch)
        self.num_known += len(batch.recognized)
        self.num_broken += len(batch.broken)
        self.num_changed += sum(bool(self._changed[index]) for index in batch.indices)
        if len(shard) == next(iter(self._pending.values())):
            self.close()

    def _keys(self, indices: Sequence[int]) -> list[str]:
        return [self._key_of(index) for index in indices]

    def _stamps(self, indices: Sequence[int]) -> list[str]:
        return [as_hex(self._stamp_of(index)) for index in indices]

    def close(self) -> None:
        """Write the unfinished shard with the images that it has so far."""
        if len(self._shard):
            number = next(iter(self._pending))
            del self._pending[number]
            empty = np.zeros((0, self._facts.num_positions, self._facts.num_quantizers), np.uint16)
            self._shard.write(self._folder, number, np.concatenate([empty, *self._codes]))
            self._shard, self._codes = Shard(), []
