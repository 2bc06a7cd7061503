"""Batches of images against the processor's own result, image by image."""

import numpy as np
import pytest
import torch
from PIL import Image

from evotok_plugin.data.batches import IndexBatches, decoded, decoded_batches
from evotok_plugin.data.files import content_digest
from evotok_plugin.data.keys import DigestIndex
from evotok_plugin.data.sources import open_source
from evotok_plugin.image_processing_evotok import EvoTokImageProcessor

BROKEN = 4


@pytest.fixture
def source(tmp_path, rng):
    """Ten images of different sizes, one of them broken."""
    for index in range(10):
        pixels = rng.integers(0, 256, (30 + index, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    (tmp_path / f"{BROKEN}.png").write_bytes(b"broken")
    return open_source(tmp_path)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_hold_the_processed_images_in_the_given_order(source, num_workers):
    processor = EvoTokImageProcessor(size=16)
    order = [7, 2, BROKEN, 9, 0]
    before = torch.get_rng_state()
    batches = list(decoded(source, order, processor, batch_size=3, num_workers=num_workers))
    assert torch.equal(torch.get_rng_state(), before)
    assert [batch.indices for batch in batches] == [[7, 2], [9, 0]] and list(map(len, batches)) == [3, 2]
    assert list(batches[0].broken) == [BROKEN] and "4.png' cannot be read" in batches[0].broken[BROKEN]
    for batch in batches:
        pictures = [source.picture(index) for index in batch.indices]
        assert batch.sizes == [picture.size for picture in pictures]
        assert batch.pixels.dtype == torch.uint8
        assert torch.equal(batch.pixel_values, processor(pictures).pixel_values)


def test_a_batch_of_broken_images_has_no_pixels(source):
    (batch,) = decoded(source, np.array([BROKEN]), EvoTokImageProcessor(size=16), batch_size=3)
    assert batch.pixels.shape == (0, 3, 16, 16) and not batch.indices and len(batch) == 1


def test_no_images_give_no_batches(source):
    assert list(decoded(source, [], EvoTokImageProcessor(size=16), batch_size=3, num_workers=2)) == []


def test_no_batch_spans_two_groups():
    batches = IndexBatches([np.arange(5), [7, 8], [9]], batch_size=2)
    assert list(batches) == [[0, 1], [2, 3], [4], [7, 8], [9]] and len(batches) == 5


def test_images_of_known_content_are_recognized_instead_of_decoded(source):
    digests = np.array([content_digest(source.content(index)) for index in (3, BROKEN)], "S16")
    known = DigestIndex(digests, np.arange(2))
    batches = IndexBatches([range(3, 6)], batch_size=3)
    (batch,) = decoded_batches(source, batches, EvoTokImageProcessor(size=16), known=known)
    assert batch.recognized == [3, BROKEN] and batch.indices == [5] and not batch.broken
    assert batch.digests == {index: content_digest(source.content(index)) for index in (3, BROKEN, 5)}
