"""Fréchet distance between two sets of feature vectors (Heusel et al. 2017), from statistics gathered batch by batch.

n vectors, D dimensions.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from evotok_plugin.common.files import write_whole
from evotok_plugin.common.processes import Processes
from evotok_plugin.errors import UserError


class FeatureStatistics:
    """Number, sum and sum of outer products of vectors, in float64 on the CPU: 8 D (D + 1) bytes for any number n."""

    def __init__(self, dim: int) -> None:
        self.count = torch.zeros((), dtype=torch.float64)
        self.total = torch.zeros(dim, dtype=torch.float64)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """Add vectors (B, D).

        Raises:
            UserError: values that are not finite.
            ValueError: vectors of another width.
        """
        if features.ndim != 2 or features.shape[1] != self.total.shape[0]:
            raise ValueError(f"expected features (B, {self.total.shape[0]}), got {tuple(features.shape)}")
        values = features.detach().to("cpu", torch.float64)
        if not values.isfinite().all():
            raise UserError("features hold values that are not finite; check the images and the model's weights")
        self.count += values.shape[0]
        self.total += values.sum(dim=0)
        self.outer += values.T @ values

    def add_up(self, processes: Processes) -> None:
        """Sum over all processes, in place."""
        for values in (self.count, self.total, self.outer):
            processes.add_up(values)

    def mean(self) -> Tensor:
        """Mean of the vectors, (D,)."""
        return self.total / self.count

    def covariance(self) -> Tensor:
        """Unbiased estimate of the covariance, (D, D).

        Raises:
            UserError: fewer than two vectors.
        """
        if self.count < 2:
            raise UserError(f"a covariance needs at least 2 feature vectors, got {int(self.count)}")
        return (self.outer - torch.outer(self.total, self.mean())) / (self.count - 1)

    def save(self, path: Path) -> None:
        """Write a safetensors file atomically; several processes may write the same one.

        Raises:
            UserError: the file cannot be written.
        """
        values = {"count": self.count, "total": self.total, "outer": self.outer}
        write_whole(path, lambda part: save_file(values, part), shared=True)

    @classmethod
    def load(cls, path: Path, dim: int) -> "FeatureStatistics":
        """Read a file written by `save`.

        Raises:
            UserError: the file does not exist, is damaged, or holds statistics of another width.
        """
        statistics = cls(dim)
        try:
            values = load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"feature statistics {str(path)!r} cannot be read: {error}") from error
        for name, expected in vars(statistics).items():
            if name not in values or values[name].shape != expected.shape or values[name].dtype != expected.dtype:
                raise UserError(f"{str(path)!r} does not hold feature statistics of width {dim}; remove the file")
            setattr(statistics, name, values[name])
        return statistics


def frechet_distance(one: FeatureStatistics, other: FeatureStatistics) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of means m and covariances C.

    With C1 = A A^T and C2 = B B^T, the eigenvalues of C1 C2 are the squared singular values of A^T B, so the trace of
    the square root is the sum of the singular values. With fewer images than dimensions the covariances are singular,
    and a matrix square root of their product would turn rounding errors of 1e-16 into 1e-8; singular values do not.

    Raises:
        UserError: fewer than two vectors in one of the sets.
        ValueError: the sets have vectors of different widths.
    """
    if one.total.shape != other.total.shape:
        raise ValueError(f"expected features of equal width, got {one.total.shape[0]} and {other.total.shape[0]}")
    covariances = one.covariance(), other.covariance()
    factors = [_factor(covariance) for covariance in covariances]
    shared = torch.linalg.svdvals(factors[0].T @ factors[1]).sum()
    distance = (one.mean() - other.mean()).square().sum()
    return max(0.0, float(distance + covariances[0].trace() + covariances[1].trace() - 2 * shared))


def _factor(covariance: Tensor) -> Tensor:
    """A (D, rank) with covariance = A A^T; directions whose variance is only rounding error are left out."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > values.max().clamp(min=0) * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] * values[kept].sqrt()
