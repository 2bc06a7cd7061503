"""Seeded values for the tensors of a research checkpoint, and images to run it on.

A tensor is determined by its name, its shape and the seed. The research code computed the outputs in `tests/golden`
from exactly these values, so the formulas must not change.
"""

import math
import zlib
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
_EMBEDDINGS = ("pos_emb", "position_embedding", "cls_token", "probe")  # not scaled by a fan-in


def read_layout(name: str) -> dict[str, list[int]]:
    """Read names and shapes of all tensors of a research checkpoint from `tests/golden/NAME.txt`, a tensor per line."""
    lines = (GOLDEN / f"{name}.txt").read_text().splitlines()
    pairs = (line.split(" ") for line in lines)
    return {tensor: [int(size) for size in shape.split("x")] for tensor, shape in pairs}


def research_tensor(name: str, shape: list[int], seed: int = 0) -> np.ndarray:
    """Values of one tensor in float32, on a scale that is typical of trained models."""
    generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
    noise = generator.standard_normal(shape, dtype=np.float32)
    kind = name.split(".")[-1]
    if name.startswith("scaling_layer"):
        return np.full_like(noise, 0.5)
    if name.startswith("quantize."):
        return _codebook_values(name, kind, noise)
    if "norm" in name or (name.startswith("classifiers") and name.split(".")[-2] == "0"):
        return np.float32(1) + np.float32(0.1) * noise if kind == "weight" else np.float32(0.05) * noise
    if "bias" in kind or noise.ndim < 2:
        return np.float32(0.02) * noise
    if any(part in name for part in _EMBEDDINGS):
        return np.float32(0.1) * noise
    return noise * np.float32(math.prod(shape[1:]) ** -0.5)


def _codebook_values(name: str, kind: str, noise: np.ndarray) -> np.ndarray:
    if kind == "codebook_used":
        return np.zeros_like(noise)
    if kind == "cluster_size_ema":
        return np.ones_like(noise)
    level = int(name.split(".")[2])
    noise = noise * np.float32(0.35 * 0.85**level)  # residuals shrink from level to level
    if kind == "weight":
        noise[-1] = 0  # the research code pads every codebook with one row
    return noise


def research_weights(layout: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Values of all tensors that `read_layout(layout)` lists."""
    return {name: research_tensor(name, shape, seed) for name, shape in read_layout(layout).items()}


def smooth_images(count: int = 2, size: int = 256, seed: int = 0) -> np.ndarray:
    """Sums of plane waves, (count, 3, size, size) float32 in [-1, 1]."""
    generator = np.random.default_rng([seed, 7])
    rows, columns = np.meshgrid(np.linspace(0, 1, size), np.linspace(0, 1, size), indexing="ij")
    images = np.zeros((count, 3, size, size))
    for channel in images.reshape(-1, size, size):
        for _ in range(6):
            down, right = generator.uniform(-14, 14), generator.uniform(-14, 14)
            channel += np.sin(down * rows + right * columns + generator.uniform(0, 6.28)) / 3
    return images.clip(-1, 1).astype(np.float32)
