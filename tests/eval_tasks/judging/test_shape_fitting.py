"""Fits of shapes against a naive search that renders every template as a scene and blurs it with scipy."""

import numpy as np
import pytest
from scipy import ndimage

from eval_tasks.judging.shape_fitting import fit_shape
from evotok_plugin.scenes.scene import COLORS, SHAPES, Scene, SceneObject, render


def drawn(shape: str, x: float, y: float, size: float, side: int) -> np.ndarray:
    scene = Scene((SceneObject(shape, "white", x / side, y / side, size / side),), background=(0, 0, 0))
    return np.asarray(render(scene, side))[..., 0] / COLORS["white"][0]


def naive_scores(coverage: np.ndarray, box: tuple[float, float, float, float]) -> dict[str, float]:
    left, top, right, bottom = box
    x0, y0, side = int(left) - 3, int(top) - 3, int(np.ceil(max(right - left, bottom - top))) + 7
    room = side + 8
    window = np.pad(coverage, room)[y0 + room : y0 + room + side, x0 + room : x0 + room + side]
    y_mean, x_mean = (value + 0.5 for value in ndimage.center_of_mass(window))
    scores = {}
    for shape in SHAPES:
        unit = drawn(shape, 64, 64, 64, side=128)
        y_unit, x_unit = ((value + 0.5) / 64 - 1 for value in ndimage.center_of_mass(unit))
        size = np.sqrt(window.sum() / (unit.sum() / 64**2))
        places = (
            ((left + right) / 2 - x0, (top + bottom) / 2 - y0, max(right - left, bottom - top)),
            (x_mean - x_unit * size, y_mean - y_unit * size, size),
        )
        blurred = [
            ndimage.gaussian_filter(drawn(shape, *place, side), blur) for place in places for blur in (0, 0.6, 1.0, 1.4)
        ]
        scores[shape] = max(np.minimum(window, one).sum() / np.maximum(window, one).sum() for one in blurred)
    return scores


def blob(rng: np.random.Generator, side: int) -> np.ndarray:
    """A shape anywhere in the image, or the union of two; sharp, blurred or noisy."""
    parts = [
        drawn(str(rng.choice(SHAPES)), *(rng.uniform(0.3, 0.7, 2) * side), float(rng.uniform(0.2, 0.7)) * side, side)
        for _ in range(int(rng.integers(1, 3)))
    ]
    coverage = ndimage.gaussian_filter(np.max(parts, axis=0), rng.choice([0.0, 0.7, 1.3]))
    noise = rng.choice([0.0, 0.05]) * rng.normal(size=coverage.shape)
    return np.clip(coverage + noise * (coverage > 0.1), 0, 1)


@pytest.mark.parametrize(("side", "number"), [(48, 60), (32, 30), (150, 6)])
def test_fits_equal_a_naive_search(side, number, rng):
    for _ in range(number):
        coverage = blob(rng, side)
        fit = fit_shape(coverage)
        scores = naive_scores(coverage, fit.box)
        assert fit.shape == max(scores, key=scores.__getitem__)
        assert fit.score == pytest.approx(max(scores.values()), abs=1e-9)


def test_a_part_of_an_image_gives_the_fit_of_the_image(rng):
    for _ in range(30):
        x, y = (int(value) for value in rng.integers(2, 20, 2))
        part = drawn("triangle", *rng.uniform(7, 9, 2), 12, 16)
        image = np.zeros((48, 48))
        image[y : y + 16, x : x + 16] = part
        assert fit_shape(part, x, y) == fit_shape(image)


def test_a_shape_that_the_border_cuts_has_a_fit(rng):
    for shape in SHAPES:
        for x, y in rng.uniform(-4, 52, (20, 2)):
            coverage = drawn(shape, x, y, 20, 48)
            if coverage.max() >= 0.5:
                fit = fit_shape(coverage)
                scores = naive_scores(coverage, fit.box)
                assert fit.score == pytest.approx(max(scores.values()), abs=1e-9)
