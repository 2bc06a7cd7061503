"""A source of noise in classes, a small substitute for Inception, and a plain reconstruction of a source."""

import hashlib

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from evotok_plugin.errors import UserError
from evotok_plugin.evaluation.options import EvaluationOptions

DIM = 12  # of the features of `SmallNetwork`


class Pictures:
    """Images of noise in four colors, which are their classes; counts how often each is decoded."""

    name = "pictures"

    def __init__(self, count=20, broken=(), labeled=True, seed=0):
        rng = np.random.default_rng(seed)
        colors = rng.integers(0, 256, (4, 3))
        noise = rng.integers(-40, 40, (count, 60, 52, 3))
        self.arrays = [(colors[i % 4] + noise[i]).clip(0, 255).astype(np.uint8) for i in range(count)]
        self.broken, self.labeled, self.decoded = set(broken), labeled, [0] * count

    def __len__(self):
        return len(self.arrays)

    def key(self, index):
        return f"{index}.png"

    def picture(self, index):
        self.decoded[index] += 1
        if index in self.broken:
            raise UserError(f"{index} is broken")
        return Image.fromarray(self.arrays[index])

    def label(self, index):
        return "abcd"[index % 4] if self.labeled else None

    def groups(self):
        return None


class SmallNetwork(nn.Module):
    """Map from uint8 images to DIM features; counts its images."""

    def __init__(self):
        super().__init__()
        self.seen = 0
        self.weight = torch.randn(3 * 6 * 6, DIM, generator=torch.Generator().manual_seed(0))

    def forward(self, images):
        assert images.dtype == torch.uint8
        self.seen += len(images)
        return (F.adaptive_avg_pool2d(images.float() / 64, 6).flatten(1) @ self.weight,)


def options(**given):
    return EvaluationOptions(batch_size=8, num_workers=0, **given)


@torch.no_grad()
def reconstruct(model, processor, source, skipped=()):
    """Pixel values, reconstructions and codes of all images, computed in one batch."""
    pictures = [Image.fromarray(a) for i, a in enumerate(source.arrays) if i not in skipped]
    pixel_values = processor(pictures).pixel_values
    codes = model.encode(pixel_values).codes
    return pixel_values, model.decode_pixels(codes[..., : model.config.pixel_depth]), codes


def digest_of(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()
