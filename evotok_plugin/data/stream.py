"""Training stream: sources mixed, shuffled and cropped, addressed by position."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from evotok_plugin.data.cropping import resized_crop
from evotok_plugin.data.mixture import BLOCK, block_pattern, whole_shares
from evotok_plugin.data.sources import ImageSource
from evotok_plugin.errors import UserError
from evotok_plugin.image_processing_evotok import EvoTokImageProcessor, as_bytes

_WINDOW = 16_384  # images from shards that are shuffled together, so that reading stays within a few shards at a time
_KEPT_BYTES = 1 << 30  # limit of memory for decoded images, which are kept if they are always cropped the same way
_TRIES = 100


@dataclass(frozen=True)
class Augmentation:
    """Augmentation as in ADM: shorter side scaled to 1.0..`max_scale` times the size, random crop, horizontal flip."""

    max_scale: float = 1.25
    flip: bool = True

    def __call__(self, picture: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
        side = round(size * float(rng.uniform(1.0, self.max_scale)))
        scale = side / min(picture.size)
        width, height = max(size, round(picture.width * scale)), max(size, round(picture.height * scale))
        left, top = int(rng.integers(width - size + 1)), int(rng.integers(height - size + 1))
        picture = resized_crop(picture, (width, height), (left, top), size)
        return ImageOps.mirror(picture) if self.flip and rng.random() < 0.5 else picture


@dataclass(frozen=True)
class StreamItem:
    """Pixels (3, size, size) in uint8, and name and reason of each broken image that was tried before."""

    pixels: Tensor
    broken: list[tuple[str, str]]


def collate(items: Sequence[StreamItem]) -> tuple[Tensor, list[tuple[str, str]]]:
    """Stack pixels to (B, 3, size, size) and concatenate the lists of broken images."""
    return torch.stack([item.pixels for item in items]), [one for item in items for one in item.broken]


class _Shuffled:
    """A source in a different order in every epoch."""

    def __init__(self, source: ImageSource, seed: Sequence[int]) -> None:
        self.source, self._seed = source, list(seed)
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def index(self, position: int) -> int:
        epoch, place = divmod(position, len(self.source))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._draw(np.random.default_rng([*self._seed, epoch]))
        return int(self._order[place])

    def _draw(self, rng: np.random.Generator) -> np.ndarray:
        """Draw a permutation; a source of shards has its shards shuffled, then the images within windows of shards."""
        groups = self.source.groups()
        if groups is None:
            return rng.permutation(len(self.source))
        order = np.argsort(rng.permutation(int(groups.max()) + 1)[groups], kind="stable")
        for start in range(0, len(order), _WINDOW):
            rng.shuffle(order[start : start + _WINDOW])
        return order


class TrainingStream(Dataset):
    """An endless shuffled stream of images from one or several sources.

    Item p (source, image and crop) depends only on the seed and p, so a run resumed at position p continues with the
    same items, whatever the number of processes. Within every 1024 consecutive positions, each source gets its share,
    rounded to a whole number. A broken image is recorded in the item and replaced with an image from beyond the end of
    the run.

    Args:
        length: number of positions of the run.
        weights: relative share of each source in the stream; by default proportional to the sources' sizes.

    Raises:
        UserError: a source has no images, the weights do not match the sources, or a share is too small.
    """

    def __init__(
        self,
        sources: Sequence[ImageSource],
        size: int,
        augmentation: Augmentation | None,
        seed: int,
        length: int,
        weights: Sequence[float] | None = None,
    ) -> None:
        if weights is not None and (len(weights) != len(sources) or min(weights) <= 0):
            raise UserError(f"expected {len(sources)} weights above 0, one per source, got {list(weights)}")
        for source in sources:
            if not len(source):
                raise UserError(f"{source.name!r} has no images to train on")
        self._shares = whole_shares([len(source) for source in sources] if weights is None else weights)
        for source, share in zip(sources, self._shares, strict=True):
            if not share:
                raise UserError(f"source {source.name!r} would get less than 1 of {BLOCK} images; raise its weight")
        self._shuffled = [
            _Shuffled(source, [seed, number] if number else [seed]) for number, source in enumerate(sources)
        ]
        self._augmentation, self._seed, self._length = augmentation, seed, length
        self._processor = EvoTokImageProcessor(size=size)
        self._block: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))
        num_images = sum(len(source) for source in sources)
        self._keep = augmentation is None and num_images * 3 * size * size <= _KEPT_BYTES
        self._kept: dict[tuple[int, int], Tensor] = {}

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, position: int) -> StreamItem:
        broken: list[tuple[str, str]] = []
        for attempt in range(_TRIES):
            number, index = self._place(position + attempt * self._length)
            source = self._shuffled[number].source
            try:
                return StreamItem(self._pixels(number, index, position), broken)
            except UserError as error:
                broken.append((f"{source.name}/{source.key(index)}", str(error)))
        raise UserError(f"{_TRIES} images in a row are broken. First: {broken[0][1]}")

    def _place(self, position: int) -> tuple[int, int]:
        """The source and the image at a position."""
        if len(self._shuffled) == 1:
            return 0, self._shuffled[0].index(position)
        block, place = divmod(position, BLOCK)
        if block != self._block[0]:
            self._block = (block, block_pattern(self._shares, [self._seed, 2, block]))
        pattern = self._block[1]
        number = int(pattern[place])
        before = block * self._shares[number] + int((pattern[:place] == number).sum())
        return number, self._shuffled[number].index(before)

    def _pixels(self, number: int, index: int, position: int) -> Tensor:
        source, size = self._shuffled[number].source, self._processor.size
        if self._augmentation is not None:
            rng = np.random.default_rng([self._seed, 1, position])
            return as_bytes(self._augmentation(source.picture(index), size, rng))
        pixels = self._kept.get((number, index))
        if pixels is None:
            pixels = as_bytes(self._processor.crop(source.picture(index)))
            if self._keep:
                self._kept[number, index] = pixels
        return pixels
