"""Reconstruction quality: PSNR and SSIM on images in [-1, 1] (data range 2)."""

import torch
import torch.nn.functional as F
from torch import Tensor

_RANGE = 2.0
_WINDOW = 11  # pixels


def psnr(images: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, (B,); both inputs (B, 3, H, W) are clamped to [-1, 1]."""
    error = (images.float().clamp(-1, 1) - target.float().clamp(-1, 1)).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(_RANGE**2 / error.clamp(min=1e-10))


def _gaussian(size: int, sigma: float = 1.5) -> Tensor:
    x = torch.arange(size) - (size - 1) / 2
    return torch.exp(-x.square() / (2 * sigma**2))


def _gaussian_window(height: int, width: int) -> Tensor:
    """Window of 11 x 11 pixels; along shorter sides the largest odd number of pixels that fits."""
    rows, columns = (_gaussian(min(_WINDOW, side - 1 + side % 2)) for side in (height, width))
    return torch.outer(rows, columns) / (rows.sum() * columns.sum())


def ssim(images: Tensor, target: Tensor) -> Tensor:
    """Structural similarity of each image, (B,); both inputs are (B, C, H, W).

    Wang et al. 2004, with a Gaussian window of 11 x 11 pixels and without padding. Along sides of fewer than 11 pixels
    the window is shorter, with the same standard deviation.
    """
    a, b = images.float().clamp(-1, 1), target.float().clamp(-1, 1)
    channels = a.shape[1]
    window = _gaussian_window(*a.shape[2:]).to(a).expand(channels, 1, -1, -1)
    mean = lambda x: F.conv2d(x, window, groups=channels)  # noqa: E731
    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2
    covariance = mean(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * _RANGE) ** 2, (0.03 * _RANGE) ** 2
    value = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    value = value / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return value.mean(dim=(1, 2, 3))
