"""A detector of colored shapes on a plain background, for rendered scenes: exact, and without weights.

Every pixel is unmixed into a color and the share of the pixel that an object covers. Connected regions become
instances; their shape is that of the best overlapping template, their color the nearest named one.

H, W image size in pixels; coverage in [0, 1]. `python -m eval_tasks.judging.scene_detector` measures the accuracy.
"""

from evotok_plugin.common import command_line

if __name__ == "__main__":
    command_line.exit_without("eval")

import argparse
import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageFilter
from scipy import ndimage

from eval_tasks.judging.rules import Instance, Rules
from eval_tasks.judging.shape_fitting import Fit, fit_shape
from evotok_plugin.common.command_parser import CommandParser, examples_of
from evotok_plugin.common.recipes import check_seed
from evotok_plugin.data.images import as_picture
from evotok_plugin.errors import UserError
from evotok_plugin.scenes.scene import COLORS, SHAPES, SKILLS, render, sample_scene

_NAMES = tuple(COLORS)
_RGB = np.array([COLORS[name] for name in _NAMES], dtype=np.float64)  # (colors, 3)


def lab(rgb: np.ndarray) -> np.ndarray:
    """Convert sRGB (..., 3) in 0..255 to CIE L*a*b* (D65), where distances approximate perceived differences."""
    value = np.asarray(rgb, dtype=np.float64) / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    )
    xyz = linear @ to_xyz.T / np.array([0.95047, 1.0, 1.08883])
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)


_LAB = lab(_RGB)
_BLURS = (0.0, 0.6, 1.0, 1.4)  # standard deviations in pixels
_FAINT = 0.1  # coverage below this is noise
_UNNAMED = 40.0  # RGB distance to the lines of all named colors beyond which a pixel has an unnamed color
_FULL_CONTRAST = 130.0  # RGB distance to the background at which such a pixel is fully covered


def unmix(pixels: np.ndarray, ground: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Explain every pixel as a mixture of the background and one named color.

    In RGB, an edge pixel is on the line from the background to its object's color. The nearest line identifies mixed
    pixels that the nearest color would confuse (half black on gray is dark gray, but belongs to a black object). A
    pixel far from all lines has an unnamed color; its coverage follows from its distance to the background.

    Args:
        pixels: (H, W, 3) sRGB in 0..255.
        ground: (3,).

    Returns:
        The coverage (H, W) in [0, 1], 0 where it is faint, and the index (H, W) of the color with the nearest line.
    """
    lines = _RGB - ground  # (colors, 3)
    lengths = np.maximum((lines**2).sum(axis=1), 1e-9)  # squared
    offsets = (pixels - ground).reshape(-1, 3)
    distances = (offsets**2).sum(axis=1)  # squared
    # A share is at most the distance to the background over the length of the line, so the other pixels are noise.
    strong = np.flatnonzero(distances >= 0.99 * _FAINT**2 * lengths.min())
    offsets, distances = offsets[strong].T, distances[strong]  # (3, P), (P,)
    shares = np.clip(lines @ offsets / lengths[:, None], 0.0, 1.0)  # (colors, P)
    errors = sum((offsets[c] - shares * lines[:, c, None]) ** 2 for c in range(3))
    best = errors.argmin(axis=0)
    share, error = (np.take_along_axis(values, best[None], axis=0)[0] for values in (shares, errors))
    share = np.where(error > _UNNAMED**2, np.clip(np.sqrt(distances) / _FULL_CONTRAST, 0.0, 1.0), share)
    coverage, nearest = np.zeros(pixels.shape[:2]), np.zeros(pixels.shape[:2], dtype=int)
    coverage.flat[strong], nearest.flat[strong] = share, best
    return coverage, nearest


def _absorb(parts: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Assign every pixel of `where` to the nearest numbered part; 0 is not a part, and all parts are in `where`."""
    if parts[where].all():
        return parts
    index = ndimage.distance_transform_edt(parts == 0, return_distances=False, return_indices=True)
    return np.where(where, parts[tuple(index)], 0)


def _drop_small(parts: np.ndarray, min_area: float) -> np.ndarray:
    return np.where(np.bincount(parts.ravel())[parts] >= min_area, parts, 0)


def _dilated(mask: np.ndarray) -> np.ndarray:
    """The mask with all pixels that touch it along an edge."""
    grown = mask.copy()
    grown[1:] |= mask[:-1]
    grown[:-1] |= mask[1:]
    grown[:, 1:] |= mask[:, :-1]
    grown[:, :-1] |= mask[:, 1:]
    return grown


def _median(values: np.ndarray) -> np.ndarray:
    """The median over the first axis; faster than numpy's for few values."""
    ordered, middle = np.sort(values, axis=0), len(values) // 2
    return ordered[middle] if len(values) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


_AROUND = 2  # pixels around an object that its faint edge may cover
_LARGEST_IMAGE = 4096  # pixels per side, of `measure` on the command line


def _numbered(where: np.ndarray, colors: np.ndarray, min_pixels: float) -> np.ndarray:
    """Number the regions of one color in a connected blob `where` from 1 on, each of `min_pixels` or more."""
    present = np.unique(colors[where])
    if len(present) == 1:
        return where.astype(int)
    parts = np.zeros(where.shape, dtype=int)
    for color in present:
        labeled, _ = ndimage.label(where & (colors == color))
        parts = np.where(labeled > 0, labeled + parts.max(), parts)
    large = _drop_small(parts, min_pixels)
    if not large.any():
        return where.astype(int)
    grown = _absorb(large, where)
    numbers = np.unique(grown[where])
    return np.where(where, 1 + np.searchsorted(numbers, grown), 0)


@dataclass(frozen=True, eq=False)
class _Part:
    """The part of an image around a region: numbered regions and coverage (H, W), and its position in the image."""

    regions: np.ndarray
    coverage: np.ndarray
    x_start: int
    y_start: int

    def fit(self, mask: np.ndarray, regions: np.ndarray) -> Fit:
        """Fit the coverage by one object: its mask, and the faint pixels around it that belong to no other region."""
        around = _dilated(_dilated(mask)) & ((regions == 0) | mask) & (self.coverage >= _FAINT)
        return fit_shape(np.where(around, self.coverage, 0.0), self.x_start, self.y_start)


@dataclass(frozen=True)
class Reading:
    """The objects of an image in arbitrary order, and the number of visible regions that are not objects."""

    instances: list[Instance]
    num_leftovers: int


@dataclass(frozen=True, kw_only=True)
class SceneDetector:
    """Detects the shapes and colors of `evotok_plugin.scenes.scene`; scores are overlaps with the templates.

    Attributes:
        min_area: area of the smallest object, as a fraction of the image.
        max_speck_area: area of the largest connected speck that `read` ignores, as a fraction of the image.
        min_score: minimum overlap of an object with its template.
        max_color_distance: maximum L*a*b* distance to a named color; beyond it an instance has no color.
    """

    min_area: float = 0.01
    max_speck_area: float = 0.002
    min_score: float = 0.75
    max_color_distance: float = 30.0

    @property
    def classes(self) -> frozenset[str]:
        """The names of the shapes."""
        return frozenset(SHAPES)

    @property
    def rules(self) -> Rules:
        """GenEval's rules without confidence thresholds: everything that this detector returns is an object."""
        return Rules(min_score=0.0, min_score_counting=0.0)

    def detect(self, image: Image.Image) -> list[Instance]:
        """Detect all shapes of an RGB image with their colors, in arbitrary order."""
        return self.read(image).instances

    def read(self, image: Image.Image) -> Reading:
        """Detect all shapes as `detect`, and count what else is visible: regions that fit no shape, and blobs that are
        too small for an object but too large for a speck."""
        pixels = np.asarray(as_picture(image), dtype=np.float64)
        border = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
        coverage, colors = unmix(pixels, _median(border))
        regions = self._regions(coverage, colors)
        found, num_leftovers = [], self._num_fragments(coverage, regions)
        for number, box in enumerate(ndimage.find_objects(regions), start=1):
            around = tuple(slice(max(side.start - _AROUND, 0), side.stop + _AROUND) for side in box)
            part = _Part(regions[around], coverage[around], around[1].start, around[0].start)
            for own, fit in self._objects(part, number, self.min_area * regions.size):
                if fit.score >= self.min_score:
                    color = self._color(pixels[around], part.coverage, own)
                    mask = np.zeros(regions.shape, dtype=bool)
                    mask[around] = own
                    found.append(Instance(fit.shape, fit.score, fit.box, mask, color))
                else:
                    num_leftovers += 1
        return Reading(found, num_leftovers)

    def _num_fragments(self, coverage: np.ndarray, regions: np.ndarray) -> int:
        """The number of connected blobs outside all regions that are larger than a speck."""
        outside = (coverage >= 0.5) & (regions == 0)
        if not outside.any():
            return 0
        blobs, _ = ndimage.label(outside)
        areas = np.bincount(blobs.ravel())[1:]
        return int((areas > self.max_speck_area * coverage.size).sum())

    def detect_batch(self, images: Sequence[Image.Image]) -> list[list[Instance]]:
        """Apply `detect` to each image."""
        return [self.detect(image) for image in images]

    def _regions(self, coverage: np.ndarray, colors: np.ndarray) -> np.ndarray:
        """Number the connected regions of one color (H, W); 0 is background and specks.

        Pixels of another color inside or along the edge of an object are assigned to the nearest large region.
        """
        foreground = coverage >= 0.5
        blobs, _ = ndimage.label(foreground)
        min_pixels = self.min_area * foreground.size
        regions, total = np.zeros_like(blobs), 0
        for blob, box in enumerate(ndimage.find_objects(blobs), start=1):
            where = blobs[box] == blob
            if where.sum() < min_pixels:
                continue
            numbered = _numbered(where, colors[box], min_pixels)
            regions[box][where] = total + numbered[where]
            total += int(numbered.max())
        return regions

    def _objects(self, part: _Part, number: int, min_pixels: float) -> list[tuple[np.ndarray, Fit]]:
        """Fit a region as one object, or as several touching objects of one color if that fits better.

        Returns:
            The mask (H, W) of each object within the part of the image, and its fit.
        """
        mask = part.regions == number
        whole = part.fit(mask, part.regions)
        best, least = [(mask, whole)], whole.score
        if least >= 0.85:
            return best
        # The bridge between two objects is fainter or narrower than the objects.
        depth = ndimage.distance_transform_edt(mask)
        cuts = [mask & (part.coverage >= share) for share in (0.6, 0.7, 0.8, 0.9)]
        cuts += [depth > pixels for pixels in (1, 2, 3)]
        for cut in cuts:
            labeled, num_cores = ndimage.label(cut)
            if num_cores < 2:
                continue
            cores = _drop_small(labeled, min_pixels / 4)
            numbers = np.unique(cores[cores > 0])
            if len(numbers) < 2:
                continue
            grown = _absorb(cores, mask)
            others = np.where(mask, grown + part.regions.max(), part.regions)
            fits: list[tuple[np.ndarray, Fit]] = []
            for core in numbers:
                own = grown == core
                fits.append((own, part.fit(own, others)))
                if fits[-1][1].score <= least:
                    break
            else:
                best, least = fits, min(fit.score for _, fit in fits)
        return best

    def _color(self, pixels: np.ndarray, coverage: np.ndarray, mask: np.ndarray) -> str | None:
        """The named color nearest to the region's fully covered pixels; None beyond `max_color_distance`."""
        core = mask & (coverage >= _median(coverage[mask]))
        distances = np.linalg.norm(_LAB - lab(_median(pixels[core])), axis=-1)
        nearest = int(distances.argmin())
        return _NAMES[nearest] if distances[nearest] <= self.max_color_distance else None


@dataclass
class Accuracy:
    """The accuracy of a detector on scenes; a scene counts if all shapes, colors and counts are right."""

    scenes: int = 0
    right: int = 0
    faults: list[str] = field(default_factory=list)

    @property
    def share(self) -> float:
        return self.right / self.scenes


def measure(
    detector: SceneDetector,
    num_scenes: int,
    seed: int,
    image_size: int = 48,
    transform: Callable[[Image.Image], Image.Image] | None = None,
) -> Accuracy:
    """Render scenes of all skills in turn, apply `transform` if given, detect, and compare."""
    rng = np.random.default_rng([seed, 99])
    result = Accuracy()
    for number in range(num_scenes):
        scene = sample_scene(rng, SKILLS[number % len(SKILLS)])
        image = render(scene, image_size)
        found = detector.detect(transform(image) if transform else image)
        detected = Counter((item.color, item.label) for item in found)
        rendered = Counter((item.color, item.shape) for item in scene.objects)
        result.scenes += 1
        result.right += detected == rendered
        if detected != rendered:
            result.faults.append(f"scene {number}: rendered {dict(rendered)}, detected {dict(detected)}")
    return result


def degrading(blur: float, noise: float, seed: int = 0) -> Callable[[Image.Image], Image.Image]:
    """A transform that blurs by a radius in pixels and adds Gaussian noise in gray levels, like a small tokenizer."""
    rng = np.random.default_rng([seed, 98])

    def degrade(image: Image.Image) -> Image.Image:
        blurred = np.asarray(image.filter(ImageFilter.GaussianBlur(blur)), dtype=np.float64)
        noisy = blurred + rng.normal(0.0, noise, blurred.shape)
        return Image.fromarray(np.clip(noisy, 0, 255).round().astype(np.uint8))

    return degrade


def reconstructing(folder: str) -> Callable[[Image.Image], Image.Image]:
    """A transform that reconstructs images with an EvoTok model, as if a perfect model had drawn them with it."""
    import torch

    from evotok_plugin.tokenizer_folder import load_tokenizer, open_image_processor

    model, processor = load_tokenizer(folder).eval(), open_image_processor(folder)

    @torch.no_grad()
    def reconstruct(image: Image.Image) -> Image.Image:
        pixels = processor(image, return_tensors="pt").pixel_values
        return processor.to_pil(model.decode_pixels(model.encode(pixels, model.config.pixel_depth).codes))[0]

    return reconstruct


def main(argv: list[str] | None = None) -> int:
    """Measure the accuracy on the command line; returns the exit code."""
    parser = CommandParser(
        prog="python -m eval_tasks.judging.scene_detector",
        description="Measure the accuracy of the scene detector on newly rendered scenes.",
        epilog=examples_of(
            "python -m eval_tasks.judging.scene_detector",
            "python -m eval_tasks.judging.scene_detector --degrade 1.0 20 --scenes 500",
        ),
    )
    parser.add_argument("--scenes", type=int, default=2000, help="number of scenes")
    parser.add_argument("--seed", type=int, default=0, help="seed of the scenes")
    parser.add_argument("--image_size", type=int, default=48, help="width and height of the images, in pixels")
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--degrade",
        type=float,
        nargs=2,
        metavar=("BLUR", "NOISE"),
        help="blur (pixels) and noise (gray levels) added to the scenes",
    )
    how.add_argument("--tokenizer", metavar="FOLDER", help="an EvoTok model that reconstructs the scenes first")
    return command_line.run(parser, argv, _measure)


def _measure(args: argparse.Namespace) -> None:
    if args.scenes < 1:
        raise UserError(f"--scenes must be at least 1, got {args.scenes}")
    check_seed(args.seed)
    if not 1 <= args.image_size <= _LARGEST_IMAGE:
        raise UserError(f"--image_size must be from 1 to {_LARGEST_IMAGE}, got {args.image_size}")
    if args.degrade and not all(0 <= value < math.inf for value in args.degrade):
        raise UserError(f"--degrade: expected two numbers of at least 0, got {args.degrade}")
    transform = None
    if args.degrade:
        transform = degrading(*args.degrade)
    elif args.tokenizer:
        transform = reconstructing(args.tokenizer)
    accuracy = measure(SceneDetector(), args.scenes, args.seed, args.image_size, transform)
    for fault in accuracy.faults[:20]:
        print(fault)
    print(f"{accuracy.right} of {accuracy.scenes} scenes right in every shape, color and count: {accuracy.share:.2%}")


if __name__ == "__main__":
    sys.exit(main())
