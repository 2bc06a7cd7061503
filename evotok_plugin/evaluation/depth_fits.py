"""Linear decoders of pixels and of a teacher's features, and a linear probe, fitted for every depth of the codes.

The decoders of a tokenizer are trained at two depths and show at others what they make of unfamiliar input. A fit of
its own for every depth shows what the codes contain. The images that are scored are never those of the fit: fits are
made to other images, or else each half of the images is predicted by a fit to the other half.

B images, N positions, C codebook_dim, T numbers to predict.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from evotok_plugin.errors import UserError
from evotok_plugin.metrics.probes import in_classes, linear_probe_accuracy, trained_probe_accuracy
from evotok_plugin.modeling_evotok import EvoTokModel

_RIDGE = 1e-4  # of the mean square of the latents


@dataclass(frozen=True)
class DepthFits:
    """Scores of the fits, by depth; the last value of each belongs to the latents before quantization.

    Attributes:
        pixel_r2: share of the variance of the pixels of a patch that a linear decoder explains.
        teacher_r2: the same for the teacher's features, standardized by channel; None without a teacher.
        probe_accuracy: accuracy of a linear classifier of the mean latents; None without labels.
        teacher_probe: the same for the mean of the teacher's features; None without labels or teacher.
    """

    pixel_r2: list[float]
    teacher_r2: list[float] | None
    probe_accuracy: list[float] | None
    teacher_probe: float | None = None


class _Fit:
    """Sums for linear regressions from latents (.., C) to targets (.., T), for the two halves of the images.

    Each half is scored by the fit to the other one, with `one_way` only the second by the fit to the first.
    """

    def __init__(self, one_way: bool) -> None:
        self._one_way = one_way
        self._sums: list[tuple[Tensor, Tensor, Tensor, Tensor] | None] = [None, None]

    def update(self, latents: Tensor, targets: Tensor, half: int) -> None:
        x = F.pad(latents.flatten(0, -2).double(), (0, 1), value=1.0).cpu()
        y = targets.flatten(0, -2).double().cpu()
        new = (x.T @ x, x.T @ y, y.square().sum(0), y.sum(0))
        old = self._sums[half]
        self._sums[half] = new if old is None else tuple(a + b for a, b in zip(old, new, strict=True))  # type: ignore[assignment]

    def r2(self, scale: Tensor | None = None) -> float:
        """Share of explained variance, over the images that are scored.

        Args:
            scale: weights of the targets (T,).
        """
        first, second = self._sums
        if first is None or second is None:
            return float("nan")
        left = total = 0.0
        for fitted, tested in ((first, second), (second, first))[: 1 if self._one_way else 2]:
            gram, cross = fitted[:2]
            ridge = _RIDGE * gram.diagonal()[:-1].mean()
            weights = torch.linalg.solve(
                gram + ridge * torch.diag(torch.tensor([1.0] * (len(gram) - 1) + [0.0])).double(), cross
            )
            gram, cross, squares, sums = tested
            errors = squares - 2 * (weights * cross).sum(0) + (weights * (gram @ weights)).sum(0)
            variances = squares - sums.square() / gram[-1, -1]
            if scale is not None:
                errors, variances = errors * scale, variances * scale
            left, total = left + float(errors.sum()), total + float(variances.sum())
        return 1 - left / total

    def precisions(self) -> Tensor:
        """One over the variance of each target (T,); 0 for constant ones."""
        sums = [part for part in self._sums if part is not None]
        count = sum(part[0][-1, -1] for part in sums)
        mean = sum(part[3] for part in sums) / count
        variance = sum(part[2] for part in sums) / count - mean**2
        assert isinstance(variance, Tensor)
        return torch.where(variance > 1e-9 * variance.max(), 1 / variance.clamp_min(1e-30), 0.0)


class DepthFitter:
    """Accumulates the sums of the fits over batches of images.

    Args:
        separate: whether the fits are made to images of their own, those added with `is_fitted`.
    """

    def __init__(self, model: EvoTokModel, separate: bool = False) -> None:
        self._model, self._num_images, self._separate = model, 0, separate
        self._num_fits = model.config.num_quantizers + 1
        self._pixels = [_Fit(separate) for _ in range(self._num_fits)]
        self._teacher = [_Fit(separate) for _ in range(self._num_fits)]
        self._pooled: list[list[np.ndarray]] = [[] for _ in range(self._num_fits)]
        self._labels: list[str | None] = []
        self._is_fitted: list[bool] = []
        self._teacher_pooled: list[np.ndarray] = []

    def update(
        self,
        pixel_values: Tensor,
        latents: Tensor,
        codes: Tensor,
        target: Tensor | None,
        labels: Sequence[str | None],
        is_fitted: bool = False,
    ) -> None:
        """Add images (B, 3, H, W) with their latents (B, N, C), codes (B, N, L) and teacher features (B, N, D)."""
        patch = self._model.config.patch_size
        patches = F.unfold(pixel_values.float(), patch, stride=patch).transpose(1, 2)
        levels = self._model.level_latents(codes).float().cumsum(dim=2)
        depths = [*levels.unbind(2), latents.float()]
        self._labels += labels
        self._is_fitted += [is_fitted] * len(labels)
        if target is not None:
            self._teacher_pooled.append(target.float().mean(dim=1).cpu().numpy())
        places = torch.arange(len(pixel_values)) + self._num_images
        self._num_images += len(pixel_values)
        halves = torch.full_like(places, int(not is_fitted)) if self._separate else places % 2
        for number, sums in enumerate(depths):
            self._pooled[number].append(sums.mean(dim=1).cpu().numpy())
            for half in (0, 1):
                chosen = (halves == half).to(sums.device)
                if chosen.any():
                    self._pixels[number].update(sums[chosen], patches[chosen], half)
                    if target is not None:
                        self._teacher[number].update(sums[chosen], target[chosen].float(), half)

    def result(self) -> DepthFits:
        """Solve the fits.

        Raises:
            UserError: there are fewer than two images, or none to fit.
        """
        if self._separate and not any(self._is_fitted):
            raise UserError("no images to fit; leave out --fit_on to fit each half of the images to the other")
        if self._num_images < 2:
            raise UserError(f"fits for every depth need at least 2 images, got {self._num_images}; omit --fit")
        probe = [self._probe(np.concatenate(parts)) for parts in self._pooled]
        known = [accuracy for accuracy in probe if accuracy is not None]
        teacher = teacher_probe = None
        if self._teacher_pooled:
            scale = self._teacher[0].precisions()
            teacher = [fit.r2(scale) for fit in self._teacher]
            teacher_probe = self._probe(np.concatenate(self._teacher_pooled))
        return DepthFits([fit.r2() for fit in self._pixels], teacher, known or None, teacher_probe)

    def _probe(self, features: np.ndarray) -> float | None:
        """Accuracy of a linear probe of features (n, C); None if the labels do not allow one."""
        labels, fitted = np.array(self._labels, dtype=object), np.array(self._is_fitted)
        if self._separate:
            known = np.array([label is not None for label in labels])
            classes = set(labels[fitted & known])
            scored = ~fitted & np.array([label in classes for label in labels])
            if len(classes) < 2 or not scored.any():
                return None
            train, test = fitted & known, scored
            return trained_probe_accuracy(features[train], list(labels[train]), features[test], list(labels[test]))
        usable = in_classes(self._labels)
        return linear_probe_accuracy(features[usable], list(labels[usable])) if usable.any() else None
