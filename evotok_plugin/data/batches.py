"""The reader of batches of images: opened, cropped and stacked in order, optionally by data-loading processes.

B images of a batch that were decoded, S the processor's size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from evotok_plugin.common.interruption import exit_with_parent
from evotok_plugin.data.files import content_digest
from evotok_plugin.data.images import open_picture
from evotok_plugin.data.keys import DigestIndex
from evotok_plugin.data.sources import ImageSource
from evotok_plugin.errors import UserError
from evotok_plugin.image_processing_evotok import EvoTokImageProcessor, as_bytes, to_pixel_values


@dataclass(frozen=True)
class ImageBatch:
    """A batch of a source's images: decoded ones, ones recognized by their content, and broken ones.

    Attributes:
        indices: the decoded images, in order.
        pixels: the decoded images as the processor crops them, (B, 3, S, S) in uint8.
        sizes: width and height in pixels of each decoded image before it was cropped.
        broken: reason by index of the images that cannot be read.
        recognized: images that were not decoded because their content is known.
        digests: by index the digest of the content of decoded and recognized images; empty bytes where contents are not
            compared, or the source has no files.
    """

    indices: list[int]
    pixels: Tensor
    sizes: list[tuple[int, int]]
    broken: dict[int, str]
    recognized: list[int]
    digests: dict[int, bytes]

    def __len__(self) -> int:
        """Number of images, including recognized and broken ones."""
        return len(self.indices) + len(self.broken) + len(self.recognized)

    @property
    def pixel_values(self) -> Tensor:
        """The decoded images in [-1, 1], (B, 3, S, S) in float32 on the CPU."""
        return to_pixel_values(self.pixels, self.pixels.device)


class IndexBatches(Sampler[list[int]]):
    """Image indices in batches, group after group; no batch spans two groups."""

    def __init__(self, groups: Sequence[Sequence[int] | np.ndarray], batch_size: int) -> None:
        self._groups, self._batch_size = groups, batch_size

    def __len__(self) -> int:
        return sum(-(-len(group) // self._batch_size) for group in self._groups)

    def __iter__(self) -> Iterator[list[int]]:
        for group in self._groups:
            for start in range(0, len(group), self._batch_size):
                yield [int(index) for index in group[start : start + self._batch_size]]


def decoded(
    source: ImageSource,
    indices: Sequence[int] | np.ndarray,
    processor: EvoTokImageProcessor,
    batch_size: int,
    num_workers: int = 0,
) -> Iterator[ImageBatch]:
    """Read images of a source in batches, in the given order.

    Broken images do not raise; each batch lists them with the reason.

    Args:
        num_workers: processes that decode ahead; 0 decodes in this process. A single batch never starts one.
    """
    return decoded_batches(source, IndexBatches([indices], batch_size), processor, num_workers)


def decoded_batches(
    source: ImageSource,
    batches: IndexBatches,
    processor: EvoTokImageProcessor,
    num_workers: int = 0,
    known: DigestIndex | None = None,
) -> Iterator[ImageBatch]:
    """`decoded` for given batches of indices.

    Args:
        known: digests of contents; images whose file has one of them are recognized instead of decoded.
    """
    loader: DataLoader[ImageBatch] = DataLoader(
        _Reader(source, processor, known),
        sampler=batches,
        batch_size=None,  # the dataset returns whole batches
        collate_fn=_unchanged,
        num_workers=min(num_workers, len(batches)) if len(batches) > 1 else 0,
        worker_init_fn=exit_with_parent,
        generator=torch.Generator(),  # otherwise starting the loader would advance the global random state
    )
    return iter(loader)


class _Reader(Dataset[ImageBatch]):
    """Batches of a source's images by their indices."""

    def __init__(self, source: ImageSource, processor: EvoTokImageProcessor, known: DigestIndex | None) -> None:
        self._source, self._processor, self._known = source, processor, known

    def __getitem__(self, indices: Sequence[int]) -> ImageBatch:
        size = self._processor.size
        batch = ImageBatch([], torch.empty(0, 3, size, size, dtype=torch.uint8), [], {}, [], {})
        pixels = []
        for index in indices:
            try:
                picture, digest = self._open(index)
                if picture is not None:
                    pixels.append(as_bytes(self._processor.crop(picture)))
            except UserError as error:
                batch.broken[index] = str(error)
                continue
            batch.digests[index] = digest
            if picture is None:
                batch.recognized.append(index)
            else:
                batch.indices.append(index)
                batch.sizes.append(picture.size)
        return replace(batch, pixels=torch.stack(pixels)) if pixels else batch

    def _open(self, index: int) -> tuple[Image | None, bytes]:
        """An image and the digest of its content; None in place of an image whose content is known."""
        if self._known is None or not hasattr(self._source, "content"):
            return self._source.picture(index), b""
        content = self._source.content(index)
        digest = content_digest(content)
        if self._known.rows(np.array([digest], "S16"))[0] >= 0:
            return None, digest
        return open_picture(content, self._source.key(index)), digest


def _unchanged(batch: Any) -> Any:
    return batch
