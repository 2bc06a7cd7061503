"""The evolution made visible: what images and features become as level after level is summed.

B batch, N positions, L levels, H W pixels, M images.
"""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from evotok_plugin.common.pictures import captioned_rows
from evotok_plugin.common.progress import progress_interval
from evotok_plugin.configuration_evotok import EvoTokConfig
from evotok_plugin.data.bad_samples import BadSamples
from evotok_plugin.data.sources import ImageSource
from evotok_plugin.image_processing_evotok import EvoTokImageProcessor
from evotok_plugin.metrics.codes import CodeUsage
from evotok_plugin.metrics.image import psnr
from evotok_plugin.modeling_evotok import EvoTokModel
from evotok_plugin.training.teacher import Teacher, teacher_features

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STRIP_WIDTH = 2000  # pixels that a row of the strip may take
_LEFT, _RIGHT, _GREY = "#0072B2", "#D55E00", "#555555"  # blue and vermillion: told apart by every kind of eye


@dataclass(frozen=True)
class Curve:
    """A score at depth 1..L over images: mean, lower and upper quartile, each (L,)."""

    mean: np.ndarray
    lower: np.ndarray
    upper: np.ndarray

    @classmethod
    def over(cls, scores: Tensor) -> "Curve":
        """Of scores (M, L)."""
        values = scores.double().numpy()
        lower, upper = np.quantile(values, (0.25, 0.75), axis=0)
        return cls(values.mean(axis=0), lower, upper)


@dataclass(frozen=True)
class Strip:
    """One image: pixels of the `original` (3, H, W) and of what 1..L levels rebuild (L, 3, H, W), in [-1, 1], and the
    PSNR of each in dB (L,)."""

    name: str
    original: Tensor
    rebuilt: Tensor
    psnr: list[float]


@dataclass(frozen=True)
class Evolution:
    """Scores of a set of images at every depth.

    Attributes:
        psnr: of the pixel decoder's images, in dB.
        cosine_own: of the semantic features to the model's own features at `semantic_depth`, mean over positions; one
            there by definition. None where the semantic decoder was not trained.
        cosine_teacher: of the semantic features to the teacher's; None without a teacher.
        code_usage, perplexity: of each level's codes, (L,).
        num_codes: how many codes of a level have been counted: images times positions.
        strips: the first of the images.
    """

    config: EvoTokConfig
    num_images: int
    image_size: int
    psnr: Curve
    cosine_own: Curve | None
    cosine_teacher: Curve | None
    code_usage: list[float]
    perplexity: list[float]
    num_codes: int
    strips: list[Strip]

    @property
    def depths(self) -> range:
        return range(1, self.config.num_quantizers + 1)

    @property
    def images(self) -> str:
        """How many of what size, in words."""
        noun = "image" if self.num_images == 1 else "images"
        return f"{self.num_images} {noun} of {self.image_size}x{self.image_size} pixels"

    def columns(self) -> dict[str, Sequence[float]]:
        """The numbers as a table, one row a depth: column name -> (L,)."""
        table: dict[str, Sequence[float]] = {"depth": self.depths}
        for name in ("psnr", "cosine_teacher", "cosine_own"):
            if (curve := getattr(self, name)) is not None:
                table |= {name: curve.mean, f"{name}_q25": curve.lower, f"{name}_q75": curve.upper}
        return table | {"code_usage": self.code_usage, "perplexity": self.perplexity}

    def write_csv(self, path: Path) -> None:
        """Write `columns`."""
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
) -> Evolution:
    """Decode images from 1, 2, .. L levels.

    Both decoders are asked at every depth, whatever depth they were trained at. A batch at a time is in memory, and of
    every image a few numbers stay.

    Args:
        model: in eval mode, on the device that does the work.
        teacher: the frozen tower whose features the semantic decoder was trained to give.
        bad: takes the names of images that cannot be read, and stops where they are too many; none are tolerated
            without it.
        max_images: of a larger source so many are taken, evenly spread.

    Raises:
        ValueError: a model in training mode, a teacher that does not fit or that the model was not trained with, no
            readable image, or too many broken ones.
    """
    if model.training:
        raise ValueError("the model is in training mode, in which it would learn from these images; call model.eval()")
    for name, value in (("max_images", max_images), ("num_strips", num_strips), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if teacher is not None:
        model.config.require_semantics()
        teacher.check_fits(model.config, processor.size)
    bad = bad or BadSamples(None, limit=0.0)
    usage = CodeUsage(model.config.num_quantizers, model.config.codebook_size)
    scores, strips = _Scores(), []
    for names, pixel_values in _batches(source, processor, max_images, batch_size, bad):
        pixel_values = pixel_values.to(model.device)
        codes = model.encode(pixel_values).codes
        usage.update(codes)
        rebuilt = _decode_all(model, codes, pixel_values, teacher, scores, num_kept=num_strips - len(strips))
        for place, pixels in enumerate(rebuilt):
            strips.append(Strip(names[place], pixel_values[place].cpu(), pixels, scores.psnr[-1][place].tolist()))
    return Evolution(
        config=model.config,
        num_images=usage.num_codes() // codes.shape[1],
        image_size=processor.size,
        psnr=Curve.over(torch.cat(scores.psnr)),
        cosine_own=Curve.over(torch.cat(scores.cosine_own)) if scores.cosine_own else None,
        cosine_teacher=Curve.over(torch.cat(scores.cosine_teacher)) if teacher is not None else None,
        code_usage=usage.usage(),
        perplexity=usage.perplexity(),
        num_codes=usage.num_codes(),
        strips=strips,
    )


@dataclass
class _Scores:
    """Of every batch (B, L), on the CPU."""

    psnr: list[Tensor] = field(default_factory=list)
    cosine_own: list[Tensor] = field(default_factory=list)
    cosine_teacher: list[Tensor] = field(default_factory=list)


def _decode_all(
    model: EvoTokModel,
    codes: Tensor,
    pixel_values: Tensor,
    teacher: Teacher | None,
    scores: _Scores,
    num_kept: int,
) -> Tensor:
    """Score codes (B, N, L) at every depth; gives the pixels of the first images (num_kept or less, L, 3, H, W)."""
    targets = []
    if model.config.semantic_decoder_trained:
        targets.append((scores.cosine_own, model.decode_semantics(codes[..., : model.config.semantic_depth])))
    if teacher is not None:
        targets.append((scores.cosine_teacher, teacher_features(teacher, pixel_values)))
    kept, quality, closeness = [], [], [[] for _ in targets]
    for depth in range(1, codes.shape[-1] + 1):
        pixels = model.decode_pixels(codes[..., :depth])
        quality.append(psnr(pixels, pixel_values))
        kept.append(pixels[:num_kept].float().cpu())
        features = model.decode_semantics(codes[..., :depth]) if targets else None
        for values, (_, target) in zip(closeness, targets, strict=True):
            values.append(F.cosine_similarity(features.float(), target.float(), dim=-1).mean(dim=1))
    scores.psnr.append(torch.stack(quality, dim=1).cpu())
    for values, (place, _) in zip(closeness, targets, strict=True):
        place.append(torch.stack(values, dim=1).cpu())
    return torch.stack(kept, dim=1)


def _batches(
    source: ImageSource, processor: EvoTokImageProcessor, max_images: int, batch_size: int, bad: BadSamples
) -> Iterator[tuple[list[str], Tensor]]:
    """Names and `pixel_values` (B, 3, H, W) of the images that can be read."""
    chosen = np.linspace(0, len(source) - 1, min(len(source), max_images)).round().astype(int)
    starts = range(0, len(chosen), batch_size)
    found = False
    for start in tqdm(starts, unit="batch", disable=len(starts) == 1, mininterval=progress_interval()):
        names, pictures = [], []
        for index in map(int, chosen[start : start + batch_size]):
            try:
                pictures.append(source.picture(index))
                names.append(source.key(index))
            except ValueError as error:
                bad.add(source.key(index), str(error))
        bad.check(len(chosen))
        if pictures:
            found = True
            yield names, processor(pictures).pixel_values
    if not found:
        raise ValueError(f"none of the {len(chosen)} images of {source.name!r} can be read")


# Drawing -------------------------------------------------------------------------------------------------------


def draw_strips(evolution: Evolution) -> Image.Image:
    """A row an image: the original, then what 1, 2, .. levels rebuild, each with its PSNR."""
    rows, captions = [], []
    for strip in evolution.strips:
        pictures = EvoTokImageProcessor.to_pil(torch.cat([strip.original[None], strip.rebuilt]))
        rows.append([_sized(picture, len(pictures)) for picture in pictures])
        captions.append(["", *(f"{score:.1f} dB" for score in strip.psnr)])
    headings = ["original", *(f"{depth} level{'s' if depth > 1 else ''}" for depth in evolution.depths)]
    return captioned_rows(rows, captions, headings, marked={evolution.config.pixel_depth: "pixel depth"})


def _sized(picture: Image.Image, columns: int) -> Image.Image:
    """Small pictures enlarged by a whole number, without smoothing; large ones reduced to what the row has room for."""
    room = _STRIP_WIDTH // columns
    if picture.width > room:
        return picture.resize((room, room), Image.Resampling.LANCZOS)
    side = picture.width * max(1, 96 // picture.width)
    return picture.resize((side, side), Image.Resampling.NEAREST)


def check_plotting() -> None:
    """Whether plots can be drawn.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError("plots need matplotlib: pip install matplotlib") from error


def _figure(height: float) -> "Figure":
    """A figure without a window system: saved, it is drawn by Agg."""
    from matplotlib.figure import Figure

    return Figure(figsize=(7.2, height), dpi=160, layout="constrained")


def plot_curves(evolution: Evolution) -> "Figure":
    """PSNR on the left axis and the features' cosine on the right one, over depth, with the quartiles over images as
    bands.

    The cosine is to the teacher's features where there is a teacher, else to the model's own at `semantic_depth`, and
    is named so; the plot has none where the semantic decoder was not trained. Each axis has its half of the plot: where
    curves of two units cross means nothing.
    """
    config, figure = evolution.config, _figure(4.8)
    left = figure.add_subplot()
    lines = [_draw(left, evolution, evolution.psnr, "PSNR (left)", half=1, color=_LEFT, marker="o")]
    if evolution.cosine_teacher is not None:
        cosine, target = evolution.cosine_teacher, "the teacher"
    else:
        own = "all" if config.semantic_depth == config.num_quantizers else f"the first {config.semantic_depth}"
        cosine, target = evolution.cosine_own, f"the features of {own} levels"
    left.set_xlabel("depth: levels summed")
    left.set_ylabel("PSNR of the image (dB)", color=_LEFT, y=0.75)
    _mark_depths(left, config)
    _finish_depth_axis(left, config.num_quantizers)
    if cosine is not None:
        right = left.twinx()
        lines.append(_draw(right, evolution, cosine, f"cosine to {target} (right)", half=0, color=_RIGHT, marker="s"))
        right.set_ylabel("cosine of the features", color=_RIGHT, y=0.25)
        right.grid(axis="y", alpha=0.3)
        right.spines["top"].set_visible(False)
    figure.suptitle(f"What each level adds: {evolution.images}")
    if evolution.num_images > 1:
        from matplotlib.patches import Patch

        lines.append(Patch(color=_GREY, alpha=0.25, linewidth=0, label="the middle half of the images"))
    figure.legend(handles=lines, loc="outside lower center", ncols=3, frameon=False, fontsize=9, columnspacing=1.2)
    return figure


def _draw(axes: "Axes", evolution: Evolution, curve: Curve, label: str, half: int, **style: Any) -> Any:
    """A curve in the lower (0) or the upper half (1) of the plot."""
    from matplotlib.ticker import MaxNLocator

    edges = [curve.mean]
    if evolution.num_images > 1:
        edges += [curve.lower, curve.upper]
        axes.fill_between(evolution.depths, curve.lower, curve.upper, color=style["color"], alpha=0.15, linewidth=0)
    low, high = float(np.min(edges)), float(np.max(edges))
    margin = 0.08 * max(high - low, 1e-3)
    low, high = low - margin, high + margin
    axes.set_yticks(
        [tick for tick in MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high) if low <= tick <= high]
    )
    axes.set_ylim(low - half * (high - low), high + (1 - half) * (high - low))
    return axes.plot(evolution.depths, curve.mean, label=label, linewidth=1.8, markersize=5, **style)[0]


def _mark_depths(axes: "Axes", config: EvoTokConfig) -> None:
    """Vertical lines where the decoders are meant to read, named above the frame."""
    close = abs(config.pixel_depth - config.semantic_depth) < 0.3 * config.num_quantizers
    for name, depth, height in (("pixel", config.pixel_depth, 1.01), ("semantic", config.semantic_depth, 1.01)):
        axes.axvline(depth, color=_GREY, linestyle=":", linewidth=1.5, zorder=0)
        if name == "semantic" and close:
            height += 0.05  # a line above the other name
        axes.annotate(
            f"{name} depth {depth}",
            (depth, height),
            xycoords=("data", "axes fraction"),
            ha="center",
            va="bottom",
            fontsize=9,
            color=_GREY,
        )


def _finish_depth_axis(axes: "Axes", num_levels: int) -> None:
    axes.set_xlim(0.5, num_levels + 0.5)
    axes.set_xticks(range(1, num_levels + 1))
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines["top"].set_visible(False)


def plot_code_usage(evolution: Evolution) -> "Figure":
    """Share of the codes that occur, and their perplexity, level by level; beside them what as many codes drawn evenly
    from the whole codebook would give, for few images cannot use all codes."""
    config, figure = evolution.config, _figure(4.8)
    shares, perplexities = figure.subplots(2, 1, sharex=True)
    even = _drawn_evenly(evolution.num_codes, config.codebook_size)
    for axes, values, reference, name, color in (
        (shares, 100 * np.array(evolution.code_usage), 100 * even.usage()[0], "codes used (%)", _LEFT),
        (perplexities, np.array(evolution.perplexity), even.perplexity()[0], "perplexity (codes)", _RIGHT),
    ):
        axes.bar(evolution.depths, values, color=color, width=0.7)
        axes.axhline(reference, color=_GREY, linestyle=":", linewidth=1.5)
        axes.set_ylim(0, 1.12 * max(reference, values.max()))
        axes.set_ylabel(name)
        axes.spines["right"].set_visible(False)
        _finish_depth_axis(axes, config.num_quantizers)
    perplexities.set_xlabel("level")
    note = f"dotted: as many codes drawn evenly from a level's {config.codebook_size:,}"
    shares.set_title(note, fontsize=9, color=_GREY)
    figure.suptitle(f"Code usage by level: {evolution.images}, {evolution.num_codes:,} positions")
    return figure


def _drawn_evenly(num_codes: int, codebook_size: int) -> CodeUsage:
    usage = CodeUsage(1, codebook_size)
    usage.update(torch.randint(codebook_size, (num_codes, 1), generator=torch.Generator().manual_seed(0)))
    return usage
