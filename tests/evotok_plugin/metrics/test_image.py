"""PSNR and SSIM against naive computations in numpy."""

import numpy as np
import pytest
import torch

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
