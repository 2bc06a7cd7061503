import numpy as np
import pytest
import torch
from PIL import Image

from evotok_plugin.common.processes import Processes
from evotok_plugin.data import cropping
from evotok_plugin.data.stream import Augmentation, TrainingStream, collate
from evotok_plugin.errors import UserError
from evotok_plugin.training.step_sampler import StepSampler


class Pictures:
    """A source in memory: image i has the uniform value i; those in `broken` cannot be read."""

    def __init__(self, count, first=0, shards=None, broken=()):
        self.name, self.count, self.first, self.shards, self.broken = f"from {first}", count, first, shards, broken

    def __len__(self):
        return self.count

    def key(self, index):
        return str(index)

    def picture(self, index):
        if index in self.broken:
            raise UserError(f"image {index} is broken")
        return Image.new("RGB", (40, 30), (self.first + index,) * 3)

    def label(self, index):
        return None

    def groups(self):
        return None if self.shards is None else np.arange(self.count) // (self.count // self.shards)


def stream(*sources, augmentation=None, seed=0, length=1000, weights=None):
    return TrainingStream(sources, 16, augmentation, seed, length, weights)


def values(items, positions):
    return [int(items[p].pixels[0, 0, 0]) for p in positions]


def test_an_item_depends_only_on_seed_and_position():
    class Noise(Pictures):
        def picture(self, index):
            return Image.fromarray(np.random.default_rng(index).integers(0, 256, (50, 60, 3), dtype=np.uint8))

    a, b, other = (stream(Noise(40), augmentation=Augmentation(), seed=seed) for seed in (1, 1, 2))
    positions = [0, 39, 40, 57, 199]
    for position in reversed(positions):
        b[position]
    assert all(torch.equal(a[p].pixels, b[p].pixels) and a[p].pixels.shape == (3, 16, 16) for p in positions)
    assert any(not torch.equal(a[p].pixels, other[p].pixels) for p in positions)


@pytest.mark.parametrize("shards", [None, 4])
def test_every_epoch_has_each_image_once_in_a_new_order(shards):
    items = stream(Pictures(40, shards=shards))
    first, second = values(items, range(40)), values(items, range(40, 80))
    assert sorted(first) == sorted(second) == list(range(40))
    assert first != second and first != sorted(first)


def test_shards_are_read_a_few_at_a_time(monkeypatch):
    monkeypatch.setattr("evotok_plugin.data.stream._WINDOW", 20)
    order = values(stream(Pictures(200, shards=20)), range(200))
    for start in range(0, 200, 20):
        window = order[start : start + 20]
        assert len({value // 10 for value in window}) == 2 and window != sorted(window)
    assert [order[i] // 10 for i in range(0, 200, 20)] != list(range(0, 20, 2))


def test_sources_get_their_shares_and_no_image_is_skipped():
    items = stream(Pictures(30), Pictures(50, first=100), weights=[3, 1], length=4096)
    seen = values(items, range(2048))
    from_second = [value for value in seen if value >= 100]
    assert len(from_second) == 2 * 256
    assert sorted(from_second[:50]) == list(range(100, 150))  # a complete epoch of the second source
    assert values(items, [2047, 5, 1024]) == [seen[2047], seen[5], seen[1024]]
    by_size = values(stream(Pictures(30), Pictures(90, first=100)), range(1024))
    assert sum(value >= 100 for value in by_size) == 768


def test_a_broken_image_is_reported_and_replaced():
    items = stream(Pictures(40, broken={7, 8}), length=40)
    found = [items[p] for p in range(40)]
    pixels, broken = collate(found)
    assert pixels.shape == (40, 3, 16, 16) and pixels.dtype == torch.uint8
    assert {("from 0/7", "image 7 is broken"), ("from 0/8", "image 8 is broken")} <= set(broken)
    assert set(values(items, range(40))) == set(range(40)) - {7, 8}
    assert values(items, range(40)) == values(stream(Pictures(40, broken={7, 8}), length=40), range(40))
    with pytest.raises(UserError, match="100 images in a row are broken. First: image"):
        stream(Pictures(3, broken={0, 1, 2}))[0]


@pytest.mark.parametrize(
    ("sources", "weights", "message"),
    [
        ([3, 4], [1.0], "expected 2 weights above 0"),
        ([3, 4], [1.0, 0.0], "expected 2 weights above 0"),
        ([3, 0], None, "has no images to train on"),
        ([3, 4], [1.0, 1e-6], "less than 1 of 1024 images; raise its weight"),
    ],
)
def test_weights_must_match_sources(sources, weights, message):
    with pytest.raises(UserError, match=message):
        stream(*(Pictures(count, first=10 * n) for n, count in enumerate(sources)), weights=weights)


def test_processes_take_disjoint_parts_of_every_batch():
    parts = [list(StepSampler(2, 5, 12, Processes(rank, 3, torch.device("cpu")))) for rank in range(3)]
    assert [len(part) for part in parts] == [3, 3, 3] and parts[1][0] == [28, 29, 30, 31]
    for step in range(3):
        together = [position for part in parts for position in part[step]]
        assert together == list(range(24 + 12 * step, 36 + 12 * step))


# Crops -----------------------------------------------------------------------------------------------------------


def gradient(width, height):
    """Red increases from left to right, green from top to bottom."""
    across = np.broadcast_to(np.linspace(0, 255, width)[None, :], (height, width))
    down = np.broadcast_to(np.linspace(0, 255, height)[:, None], (height, width))
    return Image.fromarray(np.stack([across, down, np.zeros((height, width))], axis=2).round().astype(np.uint8))


@pytest.mark.parametrize("shape", [(60, 50), (200, 170), (3, 90), (1000, 40)])
def test_cropping_before_resizing_gives_the_same_pixels(monkeypatch, shape):
    picture = gradient(*shape)
    for seed in range(5):
        crops = []
        for limit in (10**9, 0):  # resize the whole image, then only the crop's part of it
            monkeypatch.setattr(cropping, "_FULL_RESIZE", limit)
            crops.append(np.asarray(Augmentation()(picture, 16, np.random.default_rng(seed)), dtype=int))
        assert crops[0].shape == (16, 16, 3) and np.abs(crops[0] - crops[1]).max() <= 2


def test_ordinary_images_are_resized_as_a_whole(rng):
    picture = Image.fromarray(rng.integers(0, 256, (50, 60, 3), dtype=np.uint8))
    resized = picture.resize((24, 20), Image.Resampling.BICUBIC, reducing_gap=2.0).crop((3, 2, 19, 18))
    assert cropping.resized_crop(picture, (24, 20), (3, 2), 16).tobytes() == resized.tobytes()


@pytest.mark.parametrize("size", [(1, 30_000), (30_000, 1)])
def test_memory_does_not_grow_with_the_aspect_ratio(monkeypatch, size):
    sizes, resize = [], Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, to, *a, **k: sizes.append(to) or resize(self, to, *a, **k))
    crop = Augmentation()(Image.new("RGB", size, (10, 20, 30)), 256, np.random.default_rng(0))
    assert crop.getcolors() == [(256 * 256, (10, 20, 30))] and sizes == [(256, 256)]
