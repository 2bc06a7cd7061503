"""A folder of images as training and held-out sets; broken files are named and left out, never replaced."""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from evotok_plugin.image_processing_evotok import EvoTokImageProcessor

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
_HASH_SPACE = 10_000


def list_images(folder: str | Path) -> list[Path]:
    """All image files below a folder, sorted; a file is its own list.

    Raises:
        ValueError: nothing there, or no images in it.
    """
    root = Path(folder)
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise ValueError(f"image folder {str(folder)!r} does not exist")
    found = sorted(path for path in root.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        raise ValueError(f"{str(folder)!r} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return found


def is_held_out(path: Path, root: Path, fraction: float) -> bool:
    """Whether an image belongs to the held-out part: decided by its relative path alone."""
    digest = hashlib.sha256(path.relative_to(root).as_posix().encode()).digest()
    return int.from_bytes(digest[:8], "big") % _HASH_SPACE < fraction * _HASH_SPACE


@contextlib.contextmanager
def _whole_pictures_only() -> Iterator[None]:
    """Other libraries tell Pillow to fill what is missing of a file with grey; here such a file is broken."""
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def open_picture(path: str | Path) -> Image.Image:
    """Read an image as RGB.

    Raises:
        ValueError: it is missing or broken.
    """
    try:
        with _whole_pictures_only(), Image.open(path) as picture:
            return picture.convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"image {str(path)!r} does not exist") from None
    except (OSError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(f"image {str(path)!r} cannot be read: {error}") from error


def usable_images(paths: Sequence[Path], max_bad_fraction: float, report: Path | None = None) -> list[Path]:
    """The images that can be decoded.

    Raises:
        ValueError: more than `max_bad_fraction` of them are broken; `report` names them all.
    """
    good, bad = [], {}
    for path in paths:
        try:
            open_picture(path)
            good.append(path)
        except ValueError as error:
            bad[str(path)] = str(error)
    if bad and report is not None:
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text("".join(json.dumps({"image": k, "reason": v}) + "\n" for k, v in bad.items()))
    if len(bad) > max_bad_fraction * len(paths):
        where = f"; all are named in {report}" if report is not None else ""
        raise ValueError(
            f"{len(bad)} of {len(paths)} images are broken, over the limit of {max_bad_fraction:.2%} "
            f"(--max_bad_fraction). First: {next(iter(bad.values()))}{where}"
        )
    return good


@dataclass(frozen=True)
class Augmentation:
    """ADM-style: shorter side scaled to 1.0..`max_scale` times the size, random crop, horizontal flip."""

    max_scale: float = 1.25
    flip: bool = True

    def __call__(self, picture: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
        side = round(size * float(rng.uniform(1.0, self.max_scale)))
        scale = side / min(picture.size)
        width, height = max(size, round(picture.width * scale)), max(size, round(picture.height * scale))
        picture = picture.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=2.0)
        left, top = int(rng.integers(width - size + 1)), int(rng.integers(height - size + 1))
        picture = picture.crop((left, top, left + size, top + size))
        return ImageOps.mirror(picture) if self.flip and rng.random() < 0.5 else picture


class ImageStream(Dataset):
    """An endless shuffled stream of images, addressed by position.

    Item p is a function of (seed, p) alone - which image, which crop - so a run that is resumed at position p sees
    exactly what it would have seen.
    """

    def __init__(
        self, paths: Sequence[Path], size: int, augmentation: Augmentation | None, seed: int, length: int
    ) -> None:
        self._paths, self._augmentation, self._seed, self._length = list(paths), augmentation, seed, length
        self._processor = EvoTokImageProcessor(size=size)
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))
        self._decoded: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, position: int) -> Tensor:
        """Pixels (3, size, size), uint8."""
        epoch, place = divmod(position, len(self._paths))
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng([self._seed, epoch]).permutation(len(self._paths)))
        index = int(self._order[1][place])
        if self._augmentation is None:
            if index not in self._decoded:
                self._decoded[index] = as_bytes(self._processor.crop(open_picture(self._paths[index])))
            return self._decoded[index]
        rng = np.random.default_rng([self._seed, 1, position])
        return as_bytes(self._augmentation(open_picture(self._paths[index]), self._processor.size, rng))


def as_bytes(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def to_pixel_values(batch: Tensor, device: torch.device) -> Tensor:
    """uint8 (B, 3, H, W) to [-1, 1] on the device."""
    return batch.to(device, torch.float32) / 127.5 - 1.0
