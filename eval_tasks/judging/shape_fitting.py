"""The shape that best explains the coverage of one object, by overlap with rendered templates.

Pillow draws at integer coordinates of a supersampled canvas: a template depends on few integers, and is cached by them.

H, W image size and S side of a window, in pixels; coverage in [0, 1]; T templates, B degrees of blur.
"""

import math
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from eval_tasks.judging.rules import Box
from evotok_plugin.scenes.scene import COLORS, SHAPES, SUPERSAMPLE, draw_outlines, outlines

_BLURS = (0.6, 1.0, 1.4)  # standard deviations in pixels; templates are compared sharp, too
_MARGIN = 3  # pixels around the box of an object
_WHITE = COLORS["white"][0]  # templates are drawn in white, so that they are rounded as scenes are
_LARGEST_MATRIX = 96  # side of the largest window that is blurred by matrix products
_LARGEST_CACHED = 64  # pixels per side of the largest template that is cached


@dataclass(frozen=True)
class Fit:
    """The best template for a region; `score` is its overlap (soft intersection over union)."""

    shape: str
    score: float
    box: Box


def fit_shape(coverage: np.ndarray, x_start: int = 0, y_start: int = 0) -> Fit:
    """Find the shape that best matches the coverage (H, W) of one object.

    Templates are placed by the box of the coverage, and by its area and centroid (which blur does not move). They are
    rendered sharp and with several degrees of blur; the best overlap counts.

    Args:
        coverage: of the image, or of a part of it beyond which the object does not cover anything.
        x_start, y_start: the position of the part in the image.
    """
    left, right = _edges(coverage.max(axis=0), x_start)
    top, bottom = _edges(coverage.max(axis=1), y_start)
    x0, y0 = int(left) - _MARGIN, int(top) - _MARGIN
    extent = max(right - left, bottom - top)
    side = math.ceil(extent) + 2 * _MARGIN + 1
    window = _window(coverage, x0 - x_start, y0 - y_start, side)
    mass = float(window.sum())
    steps = np.arange(side, dtype=np.float64)
    x_mean = float((window * steps).sum()) / mass + 0.5
    y_mean = float((window * steps[:, None]).sum()) / mass + 0.5
    templates = np.zeros((side, 2 * len(SHAPES), side))  # (S, T, S): row, template, column
    for number, shape in enumerate(SHAPES):
        area, x_shift, y_shift = _moments(shape)
        size = math.sqrt(mass / area)
        by_box, by_mass = templates[:, 2 * number], templates[:, 2 * number + 1]
        _draw(by_box, shape, (left + right) / 2 - x0, (top + bottom) / 2 - y0, extent)
        _draw(by_mass, shape, x_mean - x_shift * size, y_mean - y_shift * size, size)
    overlaps = _overlaps(window, templates).reshape(len(SHAPES), 2).max(axis=1)
    best = int(overlaps.argmax())
    return Fit(SHAPES[best], float(overlaps[best]), (left, top, right, bottom))


def _edges(profile: np.ndarray, start: int) -> tuple[float, float]:
    """The start and end of a coverage profile with subpixel precision, from its partly covered end pixels."""
    inside = np.flatnonzero(profile >= 0.5)
    first, last = int(inside[0]), int(inside[-1])
    before = profile[first - 1] if first else 0.0
    after = profile[last + 1] if last + 1 < len(profile) else 0.0
    return float(start + first + 1 - profile[first] - before), float(start + last + profile[last] + after)


def _window(values: np.ndarray, x0: int, y0: int, side: int) -> np.ndarray:
    """A (side, side) crop of (H, W) values, padded with 0 beyond the image."""
    window = np.zeros((side, side))
    height, width = values.shape
    rows, columns = slice(max(y0, 0), min(y0 + side, height)), slice(max(x0, 0), min(x0 + side, width))
    window[rows.start - y0 : rows.stop - y0, columns.start - x0 : columns.stop - x0] = values[rows, columns]
    return window


def _overlaps(window: np.ndarray, templates: np.ndarray) -> np.ndarray:
    """The overlap of the window (S, S) with each template of (S, T, S) at its best degree of blur: (T,)."""
    drawings = _with_blur(templates)
    sums = window.sum() + np.einsum("rtc->t", templates)  # blur preserves the sum of a template
    common = np.einsum("brtc->bt", np.minimum(drawings, window[:, None], out=drawings))
    return (common / np.maximum(sums - common, 1e-9)).max(axis=0)


def _with_blur(templates: np.ndarray) -> np.ndarray:
    """The templates (S, T, S), sharp and with each degree of blur: (1 + B, S, T, S)."""
    side, number, _ = templates.shape
    drawings = np.empty((1 + len(_BLURS), *templates.shape))
    drawings[0] = templates
    if side > _LARGEST_MATRIX:
        for drawing, blur in zip(drawings[1:], _BLURS, strict=True):
            drawing[:] = _blur(_blur(templates, blur, axis=0), blur, axis=2)
        return drawings
    rows, columns = _blur_matrices(side)
    by_rows = rows @ templates.reshape(side, number * side)  # (B * S, T * S)
    by_rows = by_rows.reshape(len(_BLURS), side * number, side)
    np.matmul(by_rows, columns, out=drawings[1:].reshape(len(_BLURS), side * number, side))
    return drawings


def _blur(values: np.ndarray, blur: float, axis: int) -> np.ndarray:
    return ndimage.gaussian_filter1d(values, blur, axis=axis)


@lru_cache(maxsize=_LARGEST_MATRIX)
def _blur_matrices(side: int) -> tuple[np.ndarray, np.ndarray]:
    """Matrices that blur the rows (B * S, S) of an array from the left, and its columns (B, S, S) from the right."""
    matrices = np.stack([_blur(np.eye(side), blur, axis=0) for blur in _BLURS])
    return matrices.reshape(-1, side), np.ascontiguousarray(matrices.transpose(0, 2, 1))


# Templates -----------------------------------------------------------------------------------------------------


def _draw(window: np.ndarray, shape: str, x: float, y: float, size: float) -> None:
    """Draw the coverage of a shape as a scene renders it into an empty window (S, S); center and size in pixels."""
    side = len(window)
    # The same operations as for the object of a scene: rounding decides between two integers.
    x, y, half, scale = x / side, y / side, size / side / 2, side * SUPERSAMPLE
    box = ((x - half) * scale, (y - half) * scale, (x + half) * scale, (y + half) * scale)
    left, top, right, bottom = map(int, box)
    column, row = left // SUPERSAMPLE, top // SUPERSAMPLE
    corners = [value for figure in outlines(shape, box) for value in figure.corners]
    x_corners = tuple([int(value) - column * SUPERSAMPLE for value in corners[0::2]])
    y_corners = tuple([int(value) - row * SUPERSAMPLE for value in corners[1::2]])
    width, height = right // SUPERSAMPLE - column + 1, bottom // SUPERSAMPLE - row + 1
    cached = max(width, height) <= _LARGEST_CACHED
    drawn = (_drawn if cached else _drawn.__wrapped__)(shape, x_corners, y_corners, width, height)
    rows, columns = slice(max(row, 0), min(row + height, side)), slice(max(column, 0), min(column + width, side))
    window[rows, columns] = drawn[rows.start - row : rows.stop - row, columns.start - column : columns.stop - column]


@lru_cache(maxsize=2**14)
def _drawn(shape: str, x: tuple[int, ...], y: tuple[int, ...], width: int, height: int) -> np.ndarray:
    """The coverage (height, width) of a shape whose outlines have corners at `x`, `y` of the supersampled canvas."""
    corners = [value for pair in zip(x, y, strict=True) for value in pair]
    figures = []
    for figure in outlines(shape, (0, 0, 0, 0)):
        figures.append(figure._replace(corners=tuple(corners[: len(figure.corners)])))
        del corners[: len(figure.corners)]
    canvas = Image.new("L", (width * SUPERSAMPLE, height * SUPERSAMPLE))
    draw_outlines(ImageDraw.Draw(canvas), figures, fill=_WHITE, background=0)
    return np.asarray(canvas.resize((width, height), Image.Resampling.BOX)) / _WHITE


@cache
def _moments(shape: str) -> tuple[float, float, float]:
    """The area of a shape of size 1, and its centroid relative to the center of its box."""
    size = 64
    drawn = np.zeros((2 * size, 2 * size))
    _draw(drawn, shape, size, size, size)
    y, x = ndimage.center_of_mass(drawn)
    return float(drawn.sum() / size**2), (x + 0.5) / size - 1, (y + 0.5) / size - 1
