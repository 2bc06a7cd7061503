import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from evotok_plugin.data.images import open_picture
from evotok_plugin.losses.adversarial import (
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
)
from evotok_plugin.losses.semantic import cosine_loss, folded_cosine_loss
from evotok_plugin.metrics.codes import CodeUsage
from evotok_plugin.metrics.image import psnr, ssim


def naive_ssim(a, b, rows=11, columns=11):
    gaussian = lambda size: np.exp(-((np.arange(size) - size // 2) ** 2) / 4.5)  # noqa: E731
    window = np.outer(gaussian(rows), gaussian(columns))
    window /= window.sum()
    values = []
    for channel in range(a.shape[0]):
        for i in range(a.shape[1] - rows + 1):
            for j in range(a.shape[2] - columns + 1):
                p, q = a[channel, i : i + rows, j : j + columns], b[channel, i : i + rows, j : j + columns]
                mp, mq = (window * p).sum(), (window * q).sum()
                vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
                cov = (window * (p - mp) * (q - mq)).sum()
                values.append((2 * mp * mq + 4e-4) * (2 * cov + 3.6e-3) / ((mp**2 + mq**2 + 4e-4) * (vp + vq + 3.6e-3)))
    return np.mean(values)


def test_psnr_and_ssim_follow_their_definitions(rng):
    a = torch.from_numpy(rng.uniform(-1, 1, (2, 3, 16, 14)))
    b = (a + 0.2 * torch.randn(a.shape)).clamp(-1, 1)
    expected = [10 * np.log10(4 / ((x - y) ** 2).mean()) for x, y in zip(a.numpy(), b.numpy(), strict=True)]
    np.testing.assert_allclose(psnr(a, b), expected, rtol=1e-4)
    np.testing.assert_allclose(
        ssim(a, b), [naive_ssim(x, y) for x, y in zip(a.numpy(), b.numpy(), strict=True)], rtol=1e-3
    )
    assert float(ssim(a, a)[0]) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("size", "window"), [((8, 8), (7, 7)), ((7, 30), (7, 11)), ((11, 10), (11, 9)), ((1, 2), (1, 1))]
)
def test_ssim_of_images_smaller_than_its_window(rng, size, window):
    a = torch.from_numpy(rng.uniform(-1, 1, (1, 3, *size)))
    b = (a + 0.2 * torch.randn(a.shape)).clamp(-1, 1)
    np.testing.assert_allclose(ssim(a, b), [naive_ssim(a[0].numpy(), b[0].numpy(), *window)], rtol=1e-3)
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


def test_half_a_picture_is_broken_whatever_other_libraries_set(tmp_path, monkeypatch, rng):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    half = tmp_path / "half.png"
    Image.fromarray(rng.integers(0, 256, (50, 60, 3), dtype=np.uint8)).save(half)
    half.write_bytes(half.read_bytes()[: half.stat().st_size // 2])
    with pytest.raises(ValueError, match="half.png' cannot be read"):
        open_picture(half)
    with pytest.raises(ValueError, match="a name' cannot be read"):
        open_picture(half.read_bytes(), "a name")
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True
