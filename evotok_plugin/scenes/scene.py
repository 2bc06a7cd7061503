"""Scenes of colored shapes on a plain background: sampled from a random generator and rendered as images.

A `Scene` is a small value from which images, captions, questions and judgements are all derived. Each object is placed
in its own cell of a 3x3 grid, slightly off the cell's center, so objects never overlap.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "cross", "ring")
COLORS = {
    "red": (220, 40, 40),
    "yellow": (245, 225, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 215),
    "black": (20, 20, 20),
    "white": (250, 250, 250),
}
BACKGROUND = (165, 165, 165)
SKILLS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
GRID = 3
CELL_NAMES = (
    "top left", "top", "top right",
    "left", "center", "right",
    "bottom left", "bottom", "bottom right",
)  # fmt: skip
RELATIONS = ("left of", "right of", "above", "below")
SUPERSAMPLE = 4  # images are drawn this many times larger, then averaged
Fill = int | tuple[int, int, int]  # a gray level or a color

_JITTER = 0.01  # of the image side; with the sizes below an object stays inside its cell
_SIZES = (0.26, 0.30)


@dataclass(frozen=True)
class SceneObject:
    """One shape; `x`, `y` (its center) and `size` (side of its bounding box) are fractions of the image side."""

    shape: str
    color: str
    x: float
    y: float
    size: float

    @property
    def cell(self) -> int:
        """Row-major index of the grid cell that contains the center."""
        return min(GRID - 1, int(self.y * GRID)) * GRID + min(GRID - 1, int(self.x * GRID))

    @property
    def kind(self) -> str:
        """Color and shape: "red circle"."""
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """Objects on a background of one color (RGB, 0..255)."""

    objects: tuple[SceneObject, ...]
    background: tuple[int, int, int] = BACKGROUND


def place(rng: np.random.Generator, shape: str, color: str, cell: int) -> SceneObject:
    """Create an object in `cell` (0..8, row-major) with random jitter and size."""
    dx, dy = rng.uniform(-_JITTER, _JITTER, size=2)
    return SceneObject(
        shape=shape,
        color=color,
        x=(cell % GRID + 0.5) / GRID + float(dx),
        y=(cell // GRID + 0.5) / GRID + float(dy),
        size=float(rng.uniform(*_SIZES)),
    )


def relation(first: SceneObject, second: SceneObject) -> str | None:
    """The position of `first` relative to `second` ("left of", ...), or None if no direction dominates."""
    row, column = divmod(first.cell, GRID)
    other_row, other_column = divmod(second.cell, GRID)
    dx, dy = column - other_column, row - other_row
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    if abs(dy) > abs(dx):
        return "above" if dy < 0 else "below"
    return None


def _cells_in_relation(rng: np.random.Generator, wanted: str) -> tuple[int, int]:
    """Two cells in one row or column, the first `wanted` (such as "left of") the second."""
    low, high = sorted(rng.choice(GRID, size=2, replace=False).tolist())
    line = int(rng.integers(GRID))
    first, second = (low, high) if wanted in ("left of", "above") else (high, low)
    if wanted in ("left of", "right of"):
        return line * GRID + first, line * GRID + second
    return first * GRID + line, second * GRID + line


def sample_scene(rng: np.random.Generator, skill: str) -> Scene:
    """Sample a scene that a prompt of a GenEval skill can describe.

    Raises:
        ValueError: `skill` is not one of `SKILLS`.
    """
    if skill not in SKILLS:
        raise ValueError(f"unknown skill {skill!r}; expected one of {', '.join(SKILLS)}")
    colors = list(COLORS)
    if skill in ("single_object", "colors"):
        kinds = [(str(rng.choice(SHAPES)), str(rng.choice(colors)))]
    elif skill == "counting":
        shape, color, count = str(rng.choice(SHAPES)), str(rng.choice(colors)), int(rng.integers(2, 5))
        one_color = rng.random() < 0.75
        kinds = [(shape, color if one_color else str(rng.choice(colors))) for _ in range(count)]
    else:
        shapes, both = rng.choice(SHAPES, size=2, replace=False), rng.choice(colors, size=2, replace=False)
        kinds = list(zip(map(str, shapes), map(str, both), strict=True))
    if skill == "position":
        cells = _cells_in_relation(rng, str(rng.choice(RELATIONS)))
    else:
        cells = rng.choice(GRID * GRID, size=len(kinds), replace=False).tolist()
    return Scene(tuple(place(rng, s, c, cell) for (s, c), cell in zip(kinds, cells, strict=True)))


def sample_mixed_scene(rng: np.random.Generator) -> Scene:
    """Sample a scene of two to four objects that all differ in color or shape, in any cells.

    A question about one of them cannot be answered without telling it from the others, which scenes of a single object
    and of equal shapes do not teach.
    """
    count = int(rng.integers(2, 5))
    kinds = rng.choice(len(SHAPES) * len(COLORS), size=count, replace=False).tolist()
    cells = rng.choice(GRID * GRID, size=count, replace=False).tolist()
    colors = list(COLORS)
    return Scene(
        tuple(
            place(rng, SHAPES[kind % len(SHAPES)], colors[kind // len(SHAPES)], cell)
            for kind, cell in zip(kinds, cells, strict=True)
        )
    )


class Outline(NamedTuple):
    """A figure to fill: its kind and the coordinates (x, y, x, y, ...) of its box or vertices.

    A `hole` is filled with the background instead of the color.
    """

    kind: Literal["ellipse", "rectangle", "polygon"]
    corners: tuple[float, ...]
    hole: bool = False


def outlines(shape: str, box: tuple[float, float, float, float]) -> tuple[Outline, ...]:
    """The figures that a shape consists of, in drawing order; `box` is (left, top, right, bottom)."""
    left, top, right, bottom = box
    if shape == "circle":
        return (Outline("ellipse", box),)
    if shape == "square":
        return (Outline("rectangle", box),)
    if shape == "triangle":
        return (Outline("polygon", ((left + right) / 2, top, right, bottom, left, bottom)),)
    if shape == "cross":
        arm = 0.33 * (right - left)
        return (
            Outline("rectangle", (left + arm, top, right - arm, bottom)),
            Outline("rectangle", (left, top + arm, right, bottom - arm)),
        )
    if shape == "ring":
        inset = 0.25 * (right - left)
        inner = (left + inset, top + inset, right - inset, bottom - inset)
        return (Outline("ellipse", box), Outline("ellipse", inner, hole=True))
    raise ValueError(f"unknown shape {shape!r}; expected one of {', '.join(SHAPES)}")


def draw_outlines(draw: ImageDraw.ImageDraw, figures: Sequence[Outline], fill: Fill, background: Fill) -> None:
    """Fill the figures in order."""
    for figure in figures:
        paint = {"ellipse": draw.ellipse, "rectangle": draw.rectangle, "polygon": draw.polygon}[figure.kind]
        paint(figure.corners, fill=background if figure.hole else fill)


def render(scene: Scene, image_size: int = 48) -> Image.Image:
    """Draw a scene, anti-aliased, as an RGB image of `image_size` x `image_size` pixels."""
    side = image_size * SUPERSAMPLE
    canvas = Image.new("RGB", (side, side), scene.background)
    draw = ImageDraw.Draw(canvas)
    for item in scene.objects:
        half = item.size / 2
        left, top, right, bottom = (v * side for v in (item.x - half, item.y - half, item.x + half, item.y + half))
        draw_outlines(draw, outlines(item.shape, (left, top, right, bottom)), COLORS[item.color], scene.background)
    return canvas.resize((image_size, image_size), Image.Resampling.BOX)
