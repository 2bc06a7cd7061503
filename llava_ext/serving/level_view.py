"""An image rebuilt level by level: images and curves for the page."""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from evotok_plugin.data.images import open_picture
from evotok_plugin.evaluation.level_plots import plot_curves
from evotok_plugin.evaluation.levels import Evolution, measure_evolution
from evotok_plugin.image_processing_evotok import EvoTokImageProcessor
from evotok_plugin.modeling_evotok import EvoTokModel
from evotok_plugin.teacher import Teacher

_SHOWN = 192  # small images are enlarged to about this many pixels per side


@dataclass(frozen=True)
class LevelByLevel:
    """Images and curves that the page shows.

    Attributes:
        pictures: the image as the model sees it, then rebuilt from 1, 2, ... levels, each with a caption.
        curves: plot of PSNR and cosine similarity over depth.
        dark_curves: the same plot for dark pages.
    """

    pictures: list[tuple[Image.Image, str]]
    curves: Image.Image
    dark_curves: Image.Image


@dataclass
class _OnePicture:
    """An `ImageSource` of one image in memory."""

    image: Image.Image
    name: str = "the image"

    def __len__(self) -> int:
        return 1

    def key(self, index: int) -> str:
        return self.name

    def picture(self, index: int) -> Image.Image:
        return self.image

    def label(self, index: int) -> str | None:
        return None

    def groups(self) -> np.ndarray | None:
        return None


def level_by_level(
    tokenizer: EvoTokModel, processor: EvoTokImageProcessor, image: Image.Image, teacher: Teacher | None = None
) -> LevelByLevel:
    """Rebuild an RGB image from 1, 2, ... L levels of its codes.

    Args:
        teacher: features are compared with the teacher's; without it, with the tokenizer's own at `semantic_depth`.

    Raises:
        UserError: the teacher does not fit the tokenizer.
    """
    source = _OnePicture(image)  # an image in memory needs neither `stamp` nor `content`
    evolution = measure_evolution(tokenizer, processor, source, teacher, num_strips=1)  # type: ignore[arg-type]
    return LevelByLevel(_pictures(evolution), _curves(evolution, dark=False), _curves(evolution, dark=True))


def _curves(evolution: Evolution, dark: bool) -> Image.Image:
    file = io.BytesIO()
    plot_curves(evolution, dark).savefig(file, format="png")
    return open_picture(file.getvalue(), "the plot of the curves")


def _pictures(evolution: Evolution) -> list[tuple[Image.Image, str]]:
    (strip,) = evolution.strips
    captions = ["original"]
    for depth, quality in zip(evolution.depths, strip.psnr, strict=True):
        captions.append(f"{depth} level{'s' if depth > 1 else ''}: {quality:.1f} dB")
    images = EvoTokImageProcessor.to_pil(strip.original[None]) + EvoTokImageProcessor.to_pil(strip.rebuilt)
    return list(zip(map(_enlarged, images), captions, strict=True))


def _enlarged(image: Image.Image) -> Image.Image:
    scale = max(1, _SHOWN // image.width)
    return image.resize((scale * image.width, scale * image.height), Image.Resampling.NEAREST)
