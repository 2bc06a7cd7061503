"""Meters of an evaluation: each accumulates a metric over batches and combines it over processes.

B images of a batch, N positions, L levels, D semantic_dim.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evotok_plugin.common.processes import Processes
from evotok_plugin.data.sources import ImageSource
from evotok_plugin.evaluation.statistics_cache import StatisticsCache
from evotok_plugin.image_processing_evotok import to_pixel_values
from evotok_plugin.metrics.codes import CodeUsage
from evotok_plugin.metrics.cosine import ConstantBaseline
from evotok_plugin.metrics.frechet import FeatureStatistics, frechet_distance
from evotok_plugin.metrics.inception import INCEPTION_DIM
from evotok_plugin.metrics.probes import in_classes, knn_accuracy, linear_probe_accuracy, probed_images
from evotok_plugin.modeling_evotok import EvoTokModel
from evotok_plugin.teacher import Teacher, teacher_features


@dataclass(frozen=True)
class TokenizedBatch:
    """A batch of images with lazily computed codes, reconstructions and features, each computed at most once.

    Attributes:
        indices: indices of the images in their source.
        originals: (B, 3, H, W) in uint8, on the model's device.
    """

    model: EvoTokModel
    indices: list[int]
    originals: Tensor

    @cached_property
    def pixel_values(self) -> Tensor:
        """Originals (B, 3, H, W) in [-1, 1]."""
        return to_pixel_values(self.originals, self.originals.device)

    @cached_property
    def codes(self) -> Tensor:
        """Codes (B, N, L)."""
        codes = self.model.encode(self.pixel_values).codes
        assert codes is not None
        return codes

    @cached_property
    def pixels(self) -> Tensor:
        """Reconstructions (B, 3, H, W) at `pixel_depth`, float32, clamped to [-1, 1]."""
        codes = self.codes[..., : self.model.config.pixel_depth]
        return self.model.decode_pixels(codes, self.model.grid_of(self.pixel_values)).float().clamp(-1, 1)

    @cached_property
    def rebuilt(self) -> Tensor:
        """Reconstructions (B, 3, H, W) in uint8, as saved to a file."""
        return ((self.pixels + 1) * 127.5).round().to(torch.uint8)

    @cached_property
    def features(self) -> Tensor:
        """Semantic features (B, N, D) at `semantic_depth`, float32."""
        return self.features_at(self.model.config.semantic_depth)

    def features_at(self, depth: int) -> Tensor:
        """Semantic features (B, N, D) of the first `depth` levels, float32."""
        return self.model.decode_semantics(self.codes[..., :depth], self.model.grid_of(self.pixel_values)).float()


class Meter(Protocol):
    """Accumulator of one metric, or of several related ones."""

    def update(self, batch: TokenizedBatch) -> None:
        """Add a batch."""

    def add_up(self, processes: Processes) -> None:
        """Combine with the other processes; called once, in every process."""

    def results(self) -> dict[str, Any]:
        """Metrics by name, serializable as JSON."""


class ImageMean:
    """Mean over images of a function of two images: `measure(pixels, pixel_values)` returns (B,)."""

    def __init__(self, name: str, measure: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._name, self._measure = name, measure
        self._totals = torch.zeros(2, dtype=torch.float64)

    def update(self, batch: TokenizedBatch) -> None:
        values = self._measure(batch.pixels, batch.pixel_values).cpu().double()
        self._totals += torch.tensor([float(values.sum()), len(values)], dtype=torch.float64)

    def add_up(self, processes: Processes) -> None:
        processes.add_up(self._totals)

    def results(self) -> dict[str, float]:
        total, count = self._totals.tolist()
        return {self._name: total / count}


class Usage:
    """Fraction of the codes that occur, and perplexity, by level."""

    def __init__(self, model: EvoTokModel) -> None:
        self._usage = CodeUsage(model.config.num_quantizers, model.config.codebook_size)

    def update(self, batch: TokenizedBatch) -> None:
        self._usage.update(batch.codes)

    def add_up(self, processes: Processes) -> None:
        self._usage.add_up(processes)

    def results(self) -> dict[str, list[float]]:
        return {"code_usage": self._usage.usage(), "perplexity": self._usage.perplexity()}


class TeacherCosine:
    """Cosine of the semantic features of 1, 2, .. L levels with the teacher's, mean over positions and images.

    `semantic_cosine_constant` is the cosine that the mean of the teacher's features would reach.

    Raises:
        UserError: the teacher expects other images or returns other features.
    """

    def __init__(self, model: EvoTokModel, teacher: Teacher, image_size: int) -> None:
        teacher.fit_to(model.config, image_size)
        self._teacher = teacher
        self._totals = torch.zeros(model.config.num_quantizers, dtype=torch.float64)
        self._count = torch.zeros((), dtype=torch.float64)
        self._baseline = ConstantBaseline()

    def update(self, batch: TokenizedBatch) -> None:
        target = teacher_features(self._teacher, batch.pixel_values).float()
        cosines = [self._cosines(batch, depth, target) for depth in range(1, len(self._totals) + 1)]
        self._totals += torch.stack(cosines).cpu().double().sum(dim=1)
        self._count += len(batch.indices)
        self._baseline.update(target)

    @staticmethod
    def _cosines(batch: TokenizedBatch, depth: int, target: Tensor) -> Tensor:
        """Mean cosine of each image (B,)."""
        features = batch.features if depth == batch.model.config.semantic_depth else batch.features_at(depth)
        return F.cosine_similarity(features, target, dim=-1).mean(dim=1)

    def add_up(self, processes: Processes) -> None:
        processes.add_up(self._totals)
        processes.add_up(self._count)
        self._baseline.add_up(processes)

    def results(self) -> dict[str, Any]:
        return {
            "semantic_cosine": (self._totals / self._count).tolist(),
            "semantic_cosine_constant": self._baseline.result(),
        }


class Probes:
    """Accuracy of k-nearest neighbors and of a linear classifier on mean-pooled semantic features.

    At most 50,000 evenly spread images are used, and only classes of at least two images; see `metrics.probes`.
    """

    def __init__(self, source: ImageSource) -> None:
        self._source, self._wanted = source, probed_images(len(source))
        self._indices: list[int] = []
        self._features: list[np.ndarray] = []

    def update(self, batch: TokenizedBatch) -> None:
        wanted = [place for place, index in enumerate(batch.indices) if index in self._wanted]
        if wanted:
            self._indices += [batch.indices[place] for place in wanted]
            self._features.append(batch.features.mean(dim=1)[wanted].cpu().numpy())

    def add_up(self, processes: Processes) -> None:
        parts = processes.gather((self._indices, self._features))
        self._indices = [index for indices, _ in parts for index in indices]
        self._features = [features for _, arrays in parts for features in arrays]

    def results(self) -> dict[str, Any]:
        """Accuracies, or no results if broken images have left too few classes."""
        order = np.argsort(self._indices)
        found = [self._source.label(self._indices[place]) for place in order]
        usable = in_classes(found)
        if not usable.any():
            return {}
        features = np.concatenate(self._features)[order][usable]
        labels = [label for label, is_usable in zip(found, usable, strict=True) if is_usable and label is not None]
        return {
            "knn_accuracy": knn_accuracy(features, labels),
            "linear_probe_accuracy": linear_probe_accuracy(features, labels),
            "probe_images": len(labels),
            "probe_classes": len(set(labels)),
        }


class ReconstructionFid:
    """Fréchet distance between Inception features of originals and reconstructions, both as uint8 images.

    The images have the tokenizer's size. With 50,000 images the result is the published rFID; with fewer it is higher.

    Args:
        cache: cached statistics of the originals, in the first process; None in the others.
    """

    def __init__(self, network: nn.Module, cache: StatisticsCache | None, processes: Processes) -> None:
        self._network, self._cache = network, cache
        self._kept = cache.load() if cache is not None else None
        self._real_is_known = processes.gather(self._kept is not None)[0]
        self._real, self._rebuilt = FeatureStatistics(INCEPTION_DIM), FeatureStatistics(INCEPTION_DIM)

    def update(self, batch: TokenizedBatch) -> None:
        self._rebuilt.update(self._network(batch.rebuilt)[0])
        if not self._real_is_known:
            self._real.update(self._network(batch.originals)[0])

    def add_up(self, processes: Processes) -> None:
        self._rebuilt.add_up(processes)
        if not self._real_is_known:
            self._real.add_up(processes)

    def results(self) -> dict[str, float]:
        if self._kept is None and self._cache is not None:
            self._cache.save(self._real)
        return {"rfid": frechet_distance(self._kept or self._real, self._rebuilt)}
