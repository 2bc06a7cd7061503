"""Batches of images on their way into a code cache: read, recognized or decoded, encoded, written."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import Dataset

from evotok_plugin.data.code_cache.shards import CacheFacts, Shard
from evotok_plugin.data.files import content_digest
from evotok_plugin.data.images import open_picture
from evotok_plugin.data.keys import DigestIndex, as_hex
from evotok_plugin.data.sources import ImageSource
from evotok_plugin.image_processing_evotok import EvoTokImageProcessor, as_bytes, to_pixel_values
from evotok_plugin.modeling_evotok import EvoTokModel


class Batches:
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
class Picture:
    """An image of a source: pixels for the encoder, uint8 (3, size, size), unless its content is known already or
    `reason` tells why it cannot be read.

    Attributes:
        content: digest of the image's file; empty for a source without files.
        size: width and height in pixels before it was resized.
    """

    index: int
    key: str
    content: bytes = b""
    is_known: bool = False
    pixels: Tensor | None = None
    size: tuple[int, int] = (0, 0)
    reason: str = ""


@dataclass(frozen=True)
class Batch:
    """The images of a batch: those to encode, with their pixels (B, 3, size, size) in uint8, those whose content is
    known, and the broken ones."""

    pixels: Tensor | None
    whole: list[Picture]
    known: list[Picture]
    broken: list[Picture]

    def __len__(self) -> int:
        return len(self.whole) + len(self.known) + len(self.broken)


class Pictures(Dataset):
    """The images of a source, read; those whose content the cache holds are not decoded."""

    def __init__(self, source: ImageSource, processor: EvoTokImageProcessor, contents: DigestIndex) -> None:
        self._source, self._processor, self._contents = source, processor, contents

    def __getitem__(self, index: int) -> Picture:
        found = Picture(index, self._source.key(index))
        try:
            if not hasattr(self._source, "content"):
                return self._decoded(found, self._source.picture(index))
            content = self._source.content(index)
            found = dataclasses.replace(found, content=content_digest(content))
            if self._contents.rows(np.array([found.content], "S16"))[0] >= 0:
                return dataclasses.replace(found, is_known=True)
            return self._decoded(found, open_picture(content, found.key))
        except ValueError as error:
            return Picture(index, found.key, reason=str(error))

    def _decoded(self, found: Picture, picture: Image) -> Picture:
        return dataclasses.replace(found, pixels=as_bytes(self._processor.crop(picture)), size=picture.size)


def collate(pictures: Sequence[Picture]) -> Batch:
    """One batch of pictures."""
    whole = [picture for picture in pictures if picture.pixels is not None]
    return Batch(
        pixels=torch.stack([picture.pixels for picture in whole]) if whole else None,
        whole=[dataclasses.replace(picture, pixels=None) for picture in whole],
        known=[picture for picture in pictures if picture.is_known],
        broken=[picture for picture in pictures if picture.reason],
    )


@torch.inference_mode()
def codes_of(batch: Batch, model: EvoTokModel) -> np.ndarray | None:
    """Codes (B, N, L) in uint16; pixels go to the device as bytes, in one piece."""
    if batch.pixels is None:
        return None
    codes = model.encode(to_pixel_values(batch.pixels, model.device).to(model.dtype)).codes
    return codes.cpu().numpy().astype(np.uint16)


class ShardWriter:
    """Collects batches and writes a shard when all its images are there.

    Attributes:
        num_seen, num_known, num_broken, num_changed: images so far: all, those that were recognized by their content,
            those that cannot be read, those that were encoded because their content has changed.
    """

    def __init__(
        self,
        folder: Path,
        facts: CacheFacts,
        shards: dict[int, np.ndarray],
        stamp_of: Callable[[int], bytes],
        changed: np.ndarray,
    ) -> None:
        """
        Args:
            shards: the images (indices) of each shard by number.
            stamp_of: the stamp of an image, by index.
            changed: which images (images in the source,) the cache holds in an earlier state.
        """
        self._folder, self._facts, self._stamp_of, self._changed = folder, facts, stamp_of, changed
        self._pending = {number: len(images) for number, images in shards.items()}
        self._shard, self._codes = Shard(), []
        self.num_seen = self.num_known = self.num_broken = self.num_changed = 0

    def add(self, batch: Batch, codes: np.ndarray | None) -> None:
        """The next batch and the codes (B, N, L) of its whole pictures."""
        shard = self._shard
        shard.keys += [picture.key for picture in batch.whole]
        shard.sizes += [picture.size for picture in batch.whole]
        shard.stamps += self._stamps(batch.whole)
        shard.contents += [as_hex(picture.content) for picture in batch.whole]
        shard.known_keys += [picture.key for picture in batch.known]
        shard.known_stamps += self._stamps(batch.known)
        shard.known_contents += [as_hex(picture.content) for picture in batch.known]
        shard.broken |= {picture.key: picture.reason for picture in batch.broken}
        shard.broken_stamps += self._stamps(batch.broken)
        if codes is not None:
            self._codes.append(codes)
        self.num_seen += len(batch)
        self.num_known += len(batch.known)
        self.num_broken += len(batch.broken)
        self.num_changed += sum(bool(self._changed[picture.index]) for picture in batch.whole)
        if len(shard) == next(iter(self._pending.values())):
            self.close()

    def _stamps(self, pictures: Sequence[Picture]) -> list[str]:
        return [as_hex(self._stamp_of(picture.index)) for picture in pictures]

    def close(self) -> None:
        """Write the unfinished shard with the images that it has so far."""
        if len(self._shard):
            number = next(iter(self._pending))
            del self._pending[number]
            empty = np.zeros((0, self._facts.num_positions, self._facts.num_quantizers), np.uint16)
            self._shard.write(self._folder, number, np.concatenate([empty, *self._codes]))
            self._shard, self._codes = Shard(), []
