"""The meter of zero-shot accuracy: images are classified by the names of their classes."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from evotok_plugin.common.processes import Processes
from evotok_plugin.data.sources import ImageSource
from evotok_plugin.evaluation.meters import TokenizedBatch
from evotok_plugin.metrics.zero_shot import ZeroShotClassifier
from evotok_plugin.teacher import Teacher, teacher_features


class ZeroShot:
    """Share of images whose class name is the nearest, for the tokenizer's features and for the teacher's own.

    Args:
        class_names: words by label; a label without an entry is its own name.
        teacher: for the second figure, the upper bound; None leaves it out.
    """

    def __init__(
        self,
        source: ImageSource,
        classifier: ZeroShotClassifier,
        class_names: Mapping[str, str],
        teacher: Teacher | None,
    ) -> None:
        self._source, self._classifier, self._teacher = source, classifier, teacher
        self._labels = sorted({label for i in range(len(source)) if (label := source.label(i)) is not None})
        self._names = classifier.embed_names([class_names.get(label, label) for label in self._labels])  # (C, D)
        self._totals = torch.zeros(3, dtype=torch.float64)  # right by the tokenizer, right by the teacher, images

    def update(self, batch: TokenizedBatch) -> None:
        labels = [self._source.label(index) for index in batch.indices]
        rows = [row for row, label in enumerate(labels) if label is not None]
        if not rows:
            return
        wanted = torch.tensor([self._labels.index(label) for label in labels if label is not None])
        self._totals[0] += self._num_right(batch.features[rows], wanted)
        if self._teacher is not None:
            self._totals[1] += self._num_right(teacher_features(self._teacher, batch.pixel_values[rows]), wanted)
        self._totals[2] += len(rows)

    def _num_right(self, features: Tensor, wanted: Tensor) -> int:
        nearest = (self._classifier.embed_features(features) @ self._names.T).argmax(dim=1)
        return int((nearest.cpu() == wanted).sum())

    def add_up(self, processes: Processes) -> None:
        processes.add_up(self._totals)

    def results(self) -> dict[str, Any]:
        """Accuracies, or no results if broken images have left none with a label."""
        ours, teachers, count = self._totals.tolist()
        if not count:
            return {}
        figures = {"zero_shot_accuracy": ours / count, "zero_shot_classes": len(self._labels)}
        return figures | ({"teacher_zero_shot_accuracy": teachers / count} if self._teacher is not None else {})
