"""Scores of images and features by depth: reconstructions from 1, 2, .. L levels.

B batch, N positions, L levels, H W pixels, M images.
"""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from evotok_plugin.common.progress import progress_bar
from evotok_plugin.configuration_evotok import EvoTokConfig
from evotok_plugin.data.bad_samples import BadSamples
from evotok_plugin.data.batches import decoded
from evotok_plugin.data.sources import ImageSource, evenly_spread
from evotok_plugin.errors import UserError
from evotok_plugin.evaluation.depth_fits import DepthFits, DepthFitter
from evotok_plugin.image_processing_evotok import EvoTokImageProcessor
from evotok_plugin.metrics.codes import CodeUsage
from evotok_plugin.metrics.cosine import ConstantBaseline
from evotok_plugin.metrics.image import psnr
from evotok_plugin.metrics.probes import MAX_IMAGES
from evotok_plugin.modeling_evotok import EvoTokModel
from evotok_plugin.teacher import Teacher, teacher_features


@dataclass(frozen=True)
class Curve:
    """Mean, lower and upper quartile over images of a score at depths 1..L, each (L,)."""

    mean: np.ndarray
    lower: np.ndarray
    upper: np.ndarray

    @classmethod
    def over(cls, scores: Tensor) -> "Curve":
        """Summarize scores (M, L)."""
        values = scores.double().numpy()
        lower, upper = np.quantile(values, (0.25, 0.75), axis=0)
        return cls(values.mean(axis=0), lower, upper)


@dataclass(frozen=True)
class Strip:
    """One image at every depth.

    Attributes:
        original: pixels (3, H, W) in [-1, 1].
        rebuilt: reconstructions from 1..L levels (L, 3, H, W).
        psnr: PSNR of each reconstruction in dB (L,).
    """

    name: str
    original: Tensor
    rebuilt: Tensor
    psnr: list[float]


@dataclass(frozen=True)
class Evolution:
    """Scores of a set of images at every depth.

    Attributes:
        psnr: PSNR of the reconstructions in dB.
        cosine_own: cosine of the semantic features with the model's own features at `semantic_depth`, mean over
            positions; 1 at that depth by definition. None if the semantic decoder was not trained.
        cosine_teacher: cosine of the semantic features with the teacher's; None without a teacher.
        constant_own, constant_teacher: the cosine that a constant, the mean of the target, would reach.
        fits: scores of linear decoders and of a probe, fitted for every depth; None without `fit`.
        code_usage, perplexity: fraction of the codes that occur, and their perplexity, by level (L,).
        num_codes: number of codes counted per level: images times positions.
        strips: the first images.
    """

    config: EvoTokConfig
    num_images: int
    image_size: int
    psnr: Curve
    cosine_own: Curve | None
    cosine_teacher: Curve | None
    constant_own: float | None
    constant_teacher: float | None
    code_usage: list[float]
    perplexity: list[float]
    num_codes: int
    strips: list[Strip]
    fits: DepthFits | None = None

    @property
    def depths(self) -> range:
        """Numbers of levels that are summed: 1..L."""
        return range(1, self.config.num_quantizers + 1)

    @property
    def images(self) -> str:
        """Description of the images' number and size."""
        noun = "image" if self.num_images == 1 else "images"
        return f"{self.num_images} {noun} of {self.image_size}x{self.image_size} pixels"

    def columns(self) -> dict[str, Sequence[float]]:
        """Table with one row per depth: column (L,) by name."""
        table: dict[str, Sequence[float]] = {"depth": self.depths}
        for name in ("psnr", "cosine_teacher", "cosine_own"):
            if (curve := getattr(self, name)) is not None:
                table |= {name: curve.mean, f"{name}_q25": curve.lower, f"{name}_q75": curve.upper}
        if self.fits is not None:
            for name in ("pixel_r2", "teacher_r2", "probe_accuracy"):
                if (values := getattr(self.fits, name)) is not None:
                    table[name] = values[:-1]
        return table | {"code_usage": self.code_usage, "perplexity": self.perplexity}

    def write_csv(self, path: Path) -> None:
        """Write `columns` as CSV."""
        table = self.columns()
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(table)
            for depth, *values in zip(*table.values(), strict=True):
                writer.writerow([depth, *(f"{value:.4f}" for value in values)])


# Measuring -----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def measure_evolution(
    model: EvoTokModel,
    processor: EvoTokImageProcessor,
    source: ImageSource,
    teacher: Teacher | None = None,
    *,
    bad: BadSamples | None = None,
    max_images: int = 256,
    num_strips: int = 4,
    batch_size: int = 32,
    fit: bool = False,
    fit_on: ImageSource | None = None,
) -> Evolution:
    """Decode images from 1, 2, .. L levels and score the results.

    Both decoders are applied at every depth, whatever depth they were trained at. Memory holds one batch at a time
    and a few numbers per image.

    Args:
        model: in eval mode, on the device to use.
        teacher: the frozen vision tower whose features the semantic decoder was trained to predict.
        bad: collects broken images and limits their number; by default none are tolerated.
        fit: also fit linear decoders and a probe for every depth.
        fit_on: images to fit them to, evenly spread if there are more than 50,000; implies `fit`. By default each half
            of the images is predicted by a fit to the other half.
        max_images: of a larger source, this many evenly spread images are used.

    Raises:
        UserError: the teacher does not match the model, the model was not trained with a teacher, no image can be read,
            or too many are broken.
    """
    if model.training:
        raise ValueError("the model is in training mode and would learn from these images; call model.eval()")
    for name, value in (("max_images", max_images), ("num_strips", num_strips), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")
    if teacher is not None:
        model.config.require_semantics()
        teacher.fit_to(model.config, processor.size)
    bad = bad or BadSamples(None, limit=0.0)
    usage = CodeUsage(model.config.num_quantizers, model.config.codebook_size)
    scores = _Scores()
    strips: list[Strip] = []
    fitter = DepthFitter(model, separate=fit_on is not None) if fit or fit_on is not None else None
    if fitter is not None and fit_on is not None:
        for indices, pixel_values in _batches(fit_on, processor, MAX_IMAGES, batch_size, bad):
            _add_to_fits(fitter, model, fit_on, indices, pixel_values.to(model.device), teacher, is_fitted=True)
    for indices, pixel_values in _batches(source, processor, max_images, batch_size, bad):
        names = [source.key(index) for index in indices]
        pixel_values = pixel_values.to(model.device)
        if fitter is not None:
            codes = _add_to_fits(fitter, model, source, indices, pixel_values, teacher)
        else:
            codes = _codes_of(model, pixel_values)
        num_positions = codes.shape[1]
        usage.update(codes)
        rebuilt = _decode_all(model, codes, pixel_values, teacher, scores, num_kept=num_strips - len(strips))
        for place, pixels in enumerate(rebuilt):
            strips.append(Strip(names[place], pixel_values[place].cpu(), pixels, scores.psnr[-1][place].tolist()))
    return Evolution(
        config=model.config,
        num_images=usage.num_codes() // num_positions,
        image_size=processor.size,
        psnr=Curve.over(torch.cat(scores.psnr)),
        cosine_own=Curve.over(torch.cat(scores.cosine_own)) if scores.cosine_own else None,
        cosine_teacher=Curve.over(torch.cat(scores.cosine_teacher)) if teacher is not None else None,
        constant_own=scores.constant_own.result() if scores.cosine_own else None,
        constant_teacher=scores.constant_teacher.result() if teacher is not None else None,
        code_usage=usage.usage(),
        perplexity=usage.perplexity(),
        num_codes=usage.num_codes(),
        strips=strips,
        fits=fitter.result() if fitter is not None else None,
    )


def _codes_of(model: EvoTokModel, pixel_values: Tensor) -> Tensor:
    codes = model.encode(pixel_values).codes
    assert codes is not None
    return codes


def _add_to_fits(
    fitter: DepthFitter,
    model: EvoTokModel,
    source: ImageSource,
    indices: Sequence[int],
    pixel_values: Tensor,
    teacher: Teacher | None,
    is_fitted: bool = False,
) -> Tensor:
    """Add images of a source to the fits; returns their codes (B, N, L)."""
    encoded = model.encode(pixel_values)
    codes, latents = encoded.codes, encoded.latents
    assert codes is not None and latents is not None
    target = teacher_features(teacher, pixel_values) if teacher is not None else None
    fitter.update(pixel_values, latents, codes, target, [source.label(index) for index in indices], is_fitted)
    return codes


@dataclass
class _Scores:
    """Scores of each batch (B, L), on the CPU."""

    psnr: list[Tensor] = field(default_factory=list)
    cosine_own: list[Tensor] = field(default_factory=list)
    cosine_teacher: list[Tensor] = field(default_factory=list)
    constant_own: ConstantBaseline = field(default_factory=ConstantBaseline)
    constant_teacher: ConstantBaseline = field(default_factory=ConstantBaseline)


def _decode_all(
    model: EvoTokModel,
    codes: Tensor,
    pixel_values: Tensor,
    teacher: Teacher | None,
    scores: _Scores,
    num_kept: int,
) -> Tensor:
    """Score codes (B, N, L) at every depth.

    Returns:
        Reconstructions (num_kept or fewer, L, 3, H, W) of the first images.
    """
    targets = []
    if model.config.semantic_decoder_trained:
        own = model.decode_semantics(codes[..., : model.config.semantic_depth])
        targets.append((scores.cosine_own, own))
        scores.constant_own.update(own)
    if teacher is not None:
        target = teacher_features(teacher, pixel_values)
        targets.append((scores.cosine_teacher, target))
        scores.constant_teacher.update(target)
    kept, quality = [], []
    cosines: list[list[Tensor]] = [[] for _ in targets]
    for depth in range(1, codes.shape[-1] + 1):
        pixels = model.decode_pixels(codes[..., :depth])
        quality.append(psnr(pixels, pixel_values))
        kept.append(pixels[:num_kept].float().cpu())
        if targets:
            features = model.decode_semantics(codes[..., :depth]).float()
        for values, (_, target) in zip(cosines, targets, strict=True):
            values.append(F.cosine_similarity(features, target.float(), dim=-1).mean(dim=1))
    scores.psnr.append(torch.stack(quality, dim=1).cpu())
    for values, (collected, _) in zip(cosines, targets, strict=True):
        collected.append(torch.stack(values, dim=1).cpu())
    return torch.stack(kept, dim=1)


def _batches(
    source: ImageSource, processor: EvoTokImageProcessor, max_images: int, batch_size: int, bad: BadSamples
) -> Iterator[tuple[list[int], Tensor]]:
    """Indices and `pixel_values` (B, 3, H, W) of the readable images; broken ones are added to `bad`."""
    chosen = evenly_spread(len(source), max_images)
    num_batches = -(-len(chosen) // batch_size)
    batches = decoded(source, chosen, processor, batch_size)
    found = False
    for batch in progress_bar(batches, total=num_batches, unit="batch", disable=num_batches == 1):
        for index, reason in batch.broken.items():
            bad.add(source.key(index), reason)
        bad.check(len(chosen))
        if batch.indices:
            found = True
            yield batch.indices, batch.pixel_values
    if not found:
        raise UserError(f"none of the {len(chosen)} images of {source.name!r} can be read")
