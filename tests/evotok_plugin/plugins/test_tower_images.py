"""Images for code bases with LLaVA's interface, against the image processor of transformers."""

import numpy as np
import pytest
import torch

from evotok_plugin import EvoTokImageProcessor
from evotok_plugin.errors import UserError
from evotok_plugin.plugins.tower_images import TowerImageProcessor


def test_pixels_equal_those_of_the_image_processor(pictures):
    expected = EvoTokImageProcessor(size=48)(pictures).pixel_values
    processor = TowerImageProcessor(48)
    assert torch.equal(processor(pictures)["pixel_values"], expected)
    assert torch.equal(processor.preprocess([pictures[:1], pictures[1:]], return_tensors="pt").pixel_values, expected)
    assert np.array_equal(processor(pictures, return_tensors="np")["pixel_values"], expected.numpy())
    assert torch.equal(processor(pictures[0], return_tensors=None).pixel_values[0], expected[0])
    frames = np.stack([np.asarray(picture.resize((20, 20))) for picture in pictures])
    assert processor(frames).pixel_values.shape == (3, 3, 48, 48)


def test_llava_reads_sizes_and_mean():
    processor = TowerImageProcessor(48)
    assert processor.size == {"shortest_edge": 48} and processor.crop_size == {"height": 48, "width": 48}
    assert processor.image_mean == processor.image_std == [0.5] * 3


def test_what_is_not_supported_is_named(pictures):
    processor = TowerImageProcessor(48)
    with pytest.raises(UserError, match="does not support do_center_crop=False"):
        processor(pictures, do_center_crop=False)
    with pytest.raises(UserError, match="does not support return_tensors='tf'"):
        processor(pictures, return_tensors="tf")
    with pytest.raises(UserError, match="at least one image"):
        processor([])
