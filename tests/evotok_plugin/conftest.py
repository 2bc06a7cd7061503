"""A tiny tokenizer, its vision tower, and the features and images that tests of the plug-ins compare."""

import numpy as np
import pytest
import torch
from PIL import Image

from evotok_plugin import EvoTokModel, EvoTokVisionModel


@pytest.fixture(scope="module")
def tokenizer(tiny_evotok_folder):
    return EvoTokModel.from_pretrained(tiny_evotok_folder)


@pytest.fixture
def tower(tiny_evotok_folder):
    return EvoTokVisionModel.from_pretrained(tiny_evotok_folder)


@pytest.fixture(scope="module")
def pixel_values():
    return torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def features(tokenizer, pixel_values):
    with torch.no_grad():
        return tokenizer(pixel_values).features


@pytest.fixture(scope="module")
def pictures():
    """A square, a wide and a tall image."""
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in ((64, 64), (40, 96), (90, 50))
    ]
