import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from evotok_plugin.data.folder import (
    Augmentation,
    ImageStream,
    is_held_out,
    list_images,
    open_picture,
    usable_images,
)
from evotok_plugin.losses.adversarial import (
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
)
from evotok_plugin.losses.semantic import cosine_loss, folded_cosine_loss
from evotok_plugin.metrics.codes import CodeUsage
from evotok_plugin.metrics.image import psnr, ssim


@pytest.fixture
def photos(tmp_path, rng):
    for index in range(40):
        shape = (int(rng.integers(40, 90)), int(rng.integers(40, 90)), 3)
        (tmp_path / str(index % 3)).mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(tmp_path / str(index % 3) / f"{index}.png")
    return tmp_path


def test_the_held_out_part_follows_from_the_path_alone(photos):
    images = list_images(photos)
    held = {path for path in images if is_held_out(path, photos, 0.3)}
    assert 4 <= len(held) <= 20
    images[0].unlink() if images[0] not in held else None
    assert {path for path in list_images(photos) if is_held_out(path, photos, 0.3)} == held
    assert not any(is_held_out(path, photos, 0.0) for path in images)


def test_broken_images_are_counted_named_and_limited(photos):
    (photos / "0" / "broken.jpg").write_bytes(b"\xff\xd8 not a photo")
    (photos / "0" / "0.png").write_bytes((photos / "0" / "0.png").read_bytes()[:200])
    report = photos / "report.jsonl"
    good = usable_images(list_images(photos), 0.1, report)
    assert len(good) == 39
    assert {json.loads(line)["image"].split("/")[-1] for line in report.read_text().splitlines()} == {
        "broken.jpg",
        "0.png",
    }
    with pytest.raises(ValueError, match="2 of 41 images are broken, over the limit of 0.10%"):
        usable_images(list_images(photos), 0.001)


def test_missing_and_empty_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        list_images(tmp_path / "absent")
    with pytest.raises(ValueError, match="holds no images"):
        list_images(tmp_path)


def test_the_stream_is_a_function_of_seed_and_position(photos):
    paths = list_images(photos)
    make = lambda seed: ImageStream(paths, 32, Augmentation(), seed, 200)  # noqa: E731
    a, b, other = make(1), make(1), make(2)
    positions = [0, 39, 40, 57, 199]
    for position in reversed(positions):
        b[position]
    assert all(torch.equal(a[p], b[p]) and a[p].shape == (3, 32, 32) and a[p].dtype == torch.uint8 for p in positions)
    assert any(not torch.equal(a[p], other[p]) for p in positions)


def test_an_epoch_shows_every_image_once(photos):
    stream = ImageStream(list_images(photos), 32, None, 0, 200)
    epochs = [{stream[p].numpy().tobytes() for p in range(start, start + 40)} for start in (0, 40)]
    assert len(epochs[0]) == 40 and epochs[0] == epochs[1]


def naive_ssim(a, b):
    x = np.arange(11) - 5
    window = np.outer(*[np.exp(-(x**2) / 4.5)] * 2)
    window /= window.sum()
    values = []
    for channel in range(a.shape[0]):
        for i in range(a.shape[1] - 10):
            for j in range(a.shape[2] - 10):
                p, q = a[channel, i : i + 11, j : j + 11], b[channel, i : i + 11, j : j + 11]
                mp, mq = (window * p).sum(), (window * q).sum()
                vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
                cov = (window * (p - mp) * (q - mq)).sum()
                values.append((2 * mp * mq + 4e-4) * (2 * cov + 3.6e-3) / ((mp**2 + mq**2 + 4e-4) * (vp + vq + 3.6e-3)))
    return np.mean(values)


def test_psnr_and_ssim_follow_their_definitions(rng):
    a = torch.from_numpy(rng.uniform(-1, 1, (2, 3, 16, 14)))
    b = (a + 0.2 * torch.randn(a.shape)).clamp(-1, 1)
    expected = [10 * np.log10(4 / ((x - y) ** 2).mean()) for x, y in zip(a.numpy(), b.numpy())]
    np.testing.assert_allclose(psnr(a, b), expected, rtol=1e-4)
    np.testing.assert_allclose(ssim(a, b), [naive_ssim(x, y) for x, y in zip(a.numpy(), b.numpy())], rtol=1e-3)
    assert float(ssim(a, a)[0]) == pytest.approx(1.0)


def test_code_usage_and_perplexity():
    usage = CodeUsage(num_levels=2, codebook_size=8)
    usage.update(torch.stack([torch.arange(8), torch.zeros(8, dtype=torch.long)], -1)[None])
    usage.update(torch.stack([torch.arange(8), torch.zeros(8, dtype=torch.long)], -1)[None])
    assert usage.usage() == [1.0, 0.125]
    np.testing.assert_allclose(usage.perplexity(), [8.0, 1.0], rtol=1e-6)


def test_semantic_losses():
    target = torch.randn(5, 8)
    assert float(cosine_loss(3 * target, target)) == pytest.approx(0, abs=1e-6)
    assert float(cosine_loss(-target, target)) == pytest.approx(2, abs=1e-6)
    parts = target.clone()
    parts[:, :2] *= -1  # one part of four points the other way
    assert float(folded_cosine_loss(parts, target)) == pytest.approx(0.5, abs=1e-6)
    with pytest.raises(ValueError, match="4 equal parts"):
        folded_cosine_loss(target[:, :6], target[:, :6])


def test_adversarial_losses():
    assert float(discriminator_loss(torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 0.0]))) == pytest.approx(0.375)
    assert float(generator_loss(torch.tensor([1.0, 3.0]))) == -2.0
    assert PatchDiscriminator(channels=8)(torch.zeros(2, 3, 48, 48)).shape[:2] == (2, 1)
    weight = torch.nn.Parameter(torch.ones(3))
    ratio = adaptive_weight((2 * weight).sum(), (4 * weight).sum(), weight)
    assert float(ratio) == pytest.approx(0.5, rel=1e-3)


def test_half_a_picture_is_broken_whatever_other_libraries_set(photos, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    whole = list_images(photos)[0]
    half = photos / "half.png"
    Image.open(whole).save(half)
    half.write_bytes(half.read_bytes()[: half.stat().st_size // 2])
    with pytest.raises(ValueError, match="half.png' cannot be read"):
        open_picture(half)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True
