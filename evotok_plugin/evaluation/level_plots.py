"""Figures of a level-by-level evaluation: strips of reconstructions, curves and code usage."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from evotok_plugin.common.pictures import captioned_rows
from evotok_plugin.configuration_evotok import EvoTokConfig
from evotok_plugin.errors import UserError
from evotok_plugin.evaluation.levels import Curve, Evolution
from evotok_plugin.image_processing_evotok import EvoTokImageProcessor
from evotok_plugin.metrics.codes import CodeUsage

if TYPE_CHECKING:  # matplotlib is an optional package
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class _Colors:
    """Colors of a plot; `left` and `right`, those of its curves, are distinguishable with any color vision."""

    background: str
    text: str
    faint: str
    left: str
    right: str


_LIGHT = _Colors(background="white", text="black", faint="#555555", left="#0072B2", right="#D55E00")
_DARK = _Colors(background="#27272a", text="#f4f4f5", faint="#b4b4bb", left="#56B4E9", right="#E69F00")
_STRIP_WIDTH = 2000  # largest width of a row in pixels


def draw_strips(evolution: Evolution) -> Image.Image:
    """Draw one row per image: the original, then reconstructions from 1, 2, .. levels with their PSNR."""
    rows, captions = [], []
    for strip in evolution.strips:
        pictures = EvoTokImageProcessor.to_pil(torch.cat([strip.original[None], strip.rebuilt]))
        rows.append([_sized(picture, len(pictures)) for picture in pictures])
        captions.append(["", *(f"{score:.1f} dB" for score in strip.psnr)])
    headings = ["original", *(f"{depth} level{'s' if depth > 1 else ''}" for depth in evolution.depths)]
    return captioned_rows(rows, captions, headings, marked={evolution.config.pixel_depth: "pixel depth"})


def _sized(picture: Image.Image, columns: int) -> Image.Image:
    """Enlarge small pictures by an integer factor without smoothing; reduce large ones to the width available."""
    available = _STRIP_WIDTH // columns
    if picture.width > available:
        return picture.resize((available, available), Image.Resampling.LANCZOS)
    side = picture.width * max(1, 96 // picture.width)
    return picture.resize((side, side), Image.Resampling.NEAREST)


def check_plotting() -> None:
    """Check that plots can be drawn.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError("plots need matplotlib: pip install matplotlib") from error


def _figure(height: float) -> "Figure":
    """Create a figure that needs no window system; it is rendered by Agg when saved."""
    from matplotlib.figure import Figure

    return Figure(figsize=(7.2, height), dpi=160, layout="constrained")


def plot_curves(evolution: Evolution, dark: bool = False) -> "Figure":
    """Plot PSNR (left axis) and the cosine of features (right axis) over depth, with bands between the quartiles.

    The cosine is with the teacher's features if there is a teacher, otherwise with the model's own features at
    `semantic_depth`; the label says which. It is omitted if the semantic decoder was not trained. Each axis uses one
    half of the plot, because a crossing of curves with different units has no meaning.

    Args:
        dark: light text and curves on a dark background.
    """
    config, figure, colors = evolution.config, _figure(4.8), _DARK if dark else _LIGHT
    left = figure.add_subplot()
    lines = [_draw(left, evolution, evolution.psnr, "PSNR (left)", half=1, color=colors.left, marker="o")]
    cosine: Curve | None
    if evolution.cosine_teacher is not None:
        cosine, target, constant = evolution.cosine_teacher, "the teacher", evolution.constant_teacher
    else:
        own = "all" if config.semantic_depth == config.num_quantizers else f"the first {config.semantic_depth}"
        cosine, target = evolution.cosine_own, f"the features of {own} levels"
        constant = evolution.constant_own
    left.set_xlabel("depth: levels summed")
    left.set_ylabel("PSNR of the image (dB)", color=colors.left, y=0.75)
    _mark_depths(left, config, colors)
    _finish_depth_axis(left, config.num_quantizers)
    if cosine is not None:
        right = left.twinx()
        lines.append(
            _draw(right, evolution, cosine, f"cosine to {target} (right)", half=0, color=colors.right, marker="s")
        )
        known = "cosine of the features"
        if constant is not None:  # often far below the curve, so a number and not a line
            known += f"\n(a constant: {constant:.3f})"
        right.set_ylabel(known, color=colors.right, y=0.25)
        right.grid(axis="y", alpha=0.3)
        right.spines["top"].set_visible(False)
    figure.suptitle(f"What each level adds: {evolution.images}", color=colors.text)
    if evolution.num_images > 1:
        from matplotlib.patches import Patch

        lines.append(Patch(color=colors.faint, alpha=0.25, linewidth=0, label="middle 50% of the images"))
    style = {"frameon": False, "fontsize": 9, "columnspacing": 1.2, "labelcolor": colors.text}
    figure.legend(handles=lines, loc="outside lower center", ncols=3, **style)
    _paint(figure, colors)
    return figure


def _paint(figure: "Figure", colors: _Colors) -> None:
    """Set the colors of the background, the axes and their ticks."""
    figure.set_facecolor(colors.background)
    for axes in figure.axes:
        axes.set_facecolor(colors.background)
        axes.tick_params(color=colors.text, labelcolor=colors.text)
        axes.xaxis.label.set_color(colors.text)
        for spine in axes.spines.values():
            spine.set_edgecolor(colors.text)


def _draw(axes: "Axes", evolution: Evolution, curve: Curve, label: str, half: int, **style: Any) -> Any:
    """Plot a curve in the lower (0) or upper (1) half of the axes."""
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


def _mark_depths(axes: "Axes", config: EvoTokConfig, colors: _Colors) -> None:
    """Draw vertical lines at the depths of the trained decoders, with labels above the frame."""
    close = abs(config.pixel_depth - config.semantic_depth) < 0.3 * config.num_quantizers
    depths = [("pixel", config.pixel_depth, 1.01)]
    if config.semantic_decoder_trained:
        depths.append(("semantic", config.semantic_depth, 1.01))
    for name, depth, height in depths:
        axes.axvline(depth, color=colors.faint, linestyle=":", linewidth=1.5, zorder=0)
        if name == "semantic" and close:
            height += 0.05  # one line above the other label
        axes.annotate(
            f"{name} depth {depth}",
            (depth, height),
            xycoords=("data", "axes fraction"),
            ha="center",
            va="bottom",
            fontsize=9,
            color=colors.faint,
        )


def _finish_depth_axis(axes: "Axes", num_levels: int) -> None:
    axes.set_xlim(0.5, num_levels + 0.5)
    axes.set_xticks(range(1, num_levels + 1))
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines["top"].set_visible(False)


def plot_fits(evolution: Evolution) -> "Figure":
    """Plot what the first levels hold of pixels and of meaning, by linear fits for every depth.

    Raises:
        ValueError: the evolution was measured without fits.
    """
    if evolution.fits is None:
        raise ValueError("measure_evolution was called without fit=True")
    figure = _figure(4.4)
    axes = figure.add_subplot()
    for values, label, color, marker in (
        (evolution.fits.pixel_r2, "pixels (explained variance)", _LIGHT.left, "o"),
        (evolution.fits.teacher_r2, "teacher's features (explained variance)", _LIGHT.right, "s"),
        (evolution.fits.probe_accuracy, "classes (probe accuracy)", "#2a9d4a", "^"),
    ):
        if values is not None:
            axes.plot(
                evolution.depths, values[:-1], label=label, color=color, marker=marker, linewidth=1.8, markersize=5
            )
            axes.axhline(values[-1], color=color, linestyle=":", linewidth=1.2)
    axes.set_ylim(-0.05, 1)
    axes.set_xlabel("depth: levels summed")
    axes.set_ylabel("linear fit to the codes of this depth")
    _mark_depths(axes, evolution.config, _LIGHT)
    _finish_depth_axis(axes, evolution.config.num_quantizers)
    figure.suptitle(f"What the codes hold: {evolution.images}; dotted: before quantization", fontsize=10)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8, columnspacing=1.2)
    return figure


def plot_code_usage(evolution: Evolution) -> "Figure":
    """Plot the fraction of the codes that occur, and their perplexity, by level.

    Dotted lines show the values for as many codes drawn uniformly from the codebook, because few images cannot use all
    codes.
    """
    config, figure = evolution.config, _figure(4.8)
    shares, perplexities = figure.subplots(2, 1, sharex=True)
    uniform = _uniform_usage(evolution.num_codes, config.codebook_size)
    for axes, values, reference, name, color in (
        (shares, 100 * np.array(evolution.code_usage), 100 * uniform.usage()[0], "codes used (%)", _LIGHT.left),
        (perplexities, np.array(evolution.perplexity), uniform.perplexity()[0], "perplexity (codes)", _LIGHT.right),
    ):
        axes.bar(evolution.depths, values, color=color, width=0.7)
        axes.axhline(reference, color=_LIGHT.faint, linestyle=":", linewidth=1.5)
        axes.set_ylim(0, 1.12 * max(reference, values.max()))
        axes.set_ylabel(name)
        axes.spines["right"].set_visible(False)
        _finish_depth_axis(axes, config.num_quantizers)
    perplexities.set_xlabel("level")
    note = f"dotted: the same number of codes drawn uniformly from the {config.codebook_size:,} of a level"
    shares.set_title(note, fontsize=9, color=_LIGHT.faint)
    figure.suptitle(f"Code usage by level: {evolution.images}, {evolution.num_codes:,} positions")
    return figure


def _uniform_usage(num_codes: int, codebook_size: int) -> CodeUsage:
    usage = CodeUsage(1, codebook_size)
    usage.update(torch.randint(codebook_size, (num_codes, 1), generator=torch.Generator().manual_seed(0)))
    return usage
