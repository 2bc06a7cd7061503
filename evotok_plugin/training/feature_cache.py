"""A cache of the features that frozen networks compute for images that recur unchanged."""

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

LARGEST = 4 * 2**30  # bytes; further images are computed every time


class FeatureCache:
    """Features by the content of an image, in the memory of the CPU.

    Results can differ in the last bits from those of another batch size. Only images that recur exactly are found, so
    the cache has no effect with random crops.
    """

    def __init__(self, limit: int = LARGEST) -> None:
        self._features: dict[bytes, list[Tensor]] = {}
        self._limit, self._size = limit, 0

    def __len__(self) -> int:
        """Number of images."""
        return len(self._features)

    def __call__(self, images: Tensor, compute: Callable[[Tensor], Sequence[Tensor]]) -> list[Tensor]:
        """The features (B, ...) of images (B, ...); `compute` is called for those that are new."""
        rows = images.detach().cpu().contiguous()
        keys = [hashlib.blake2b(row.view(torch.uint8).numpy(), digest_size=16).digest() for row in rows]
        places = {key: place for place, key in enumerate(keys) if key not in self._features}
        new: dict[bytes, list[Tensor]] = {}
        if places:
            computed = compute(images[list(places.values())])
            for row, key in enumerate(places):
                new[key] = [one[row].detach().cpu() for one in computed]
                size = sum(one.nbytes for one in new[key])
                if self._size + size <= self._limit:
                    self._features[key], self._size = new[key], self._size + size
        found = [new.get(key) or self._features[key] for key in keys]
        return [torch.stack(parts).to(images.device) for parts in zip(*found, strict=True)]
