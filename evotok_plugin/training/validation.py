"""Validation of a tokenizer on held-out images: figures, and a picture of originals over reconstructions."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from evotok_plugin.common.pictures import image_grid
from evotok_plugin.common.processes import Processes
from evotok_plugin.data.batches import decoded
from evotok_plugin.data.sources import ImageSource, evenly_spread
from evotok_plugin.errors import UserError
from evotok_plugin.image_processing_evotok import EvoTokImageProcessor
from evotok_plugin.losses.semantic import cosine_loss
from evotok_plugin.metrics.codes import CodeUsage
from evotok_plugin.metrics.cosine import ConstantBaseline
from evotok_plugin.metrics.image import psnr
from evotok_plugin.modeling_evotok import EvoTokModel
from evotok_plugin.teacher import Teacher, teacher_features

_BATCH_SIZE = 64
_SHOWN = 8  # images in the picture

BrokenImages = list[tuple[str, str]]  # names and reasons


@dataclass
class Validation:
    """Figures over all processes, and the picture on the first process; both are empty without held-out images."""

    figures: dict[str, float] = field(default_factory=dict)
    picture: Image.Image | None = None


class Validator:
    """Validates on up to `num_images` images of a source, which the processes share.

    Args:
        report_broken: receives the images that this process could not read, once in each validation.
    """

    def __init__(
        self,
        source: ImageSource,
        num_images: int,
        processor: EvoTokImageProcessor,
        teacher: Teacher | None,
        processes: Processes,
        report_broken: Callable[[BrokenImages], None],
    ) -> None:
        self._source, self._processor, self._teacher, self._processes = source, processor, teacher, processes
        self._report_broken = report_broken
        # Spread evenly: sources in ImageNet's layout are sorted by class.
        self._indices = evenly_spread(len(source), num_images)

    def __len__(self) -> int:
        """Number of images over all processes."""
        return len(self._indices)

    @torch.no_grad()
    def run(self, model: EvoTokModel, autocast: Callable[[], AbstractContextManager]) -> Validation:
        """PSNR, semantic cosine (and that of a constant) and code usage.

        All processes must call this; `model` ends in training mode.

        Raises:
            UserError: none of the images can be read.
        """
        if not self._indices:
            return Validation()
        usage, baseline = CodeUsage(model.config.num_quantizers, model.config.codebook_size), ConstantBaseline()
        sums, shown = torch.zeros(3, dtype=torch.float64), None
        broken: BrokenImages = []
        model.eval()
        for pixel_values in self._batches(broken):
            with autocast():
                output = model(pixel_values)
            usage.update(output.codes)
            sums[0] += psnr(output.pixels, pixel_values).sum().cpu()
            if self._teacher is not None:
                with autocast():
                    target = teacher_features(self._teacher, pixel_values)
                sums[1] += len(pixel_values) * (1 - float(cosine_loss(output.features, target)))
                baseline.update(target)
            sums[2] += len(pixel_values)
            shown = shown or (pixel_values[:_SHOWN], output.pixels[:_SHOWN])
        model.train()
        self._processes.add_up(sums)
        usage.add_up(self._processes)
        baseline.add_up(self._processes)
        self._report_broken(broken)
        total_psnr, total_cosine, count = sums.tolist()
        if not count:
            raise UserError(f"none of the {len(self)} images to validate on can be read")
        figures = {"val_psnr": total_psnr / count}
        if self._teacher is not None:
            figures["val_semantic_cosine"] = total_cosine / count
            figures["val_semantic_cosine_constant"] = baseline.result()
        share = usage.usage()
        figures |= {"val_code_usage_first": share[0], "val_code_usage_last": share[-1]}
        return Validation(figures, _compare(*shown) if self._processes.is_first and shown else None)

    def _batches(self, broken: BrokenImages) -> Iterator[Tensor]:
        """Pixel values (B, 3, H, W) of this process's share of the images; broken ones are added to `broken`."""
        own = self._indices[self._processes.rank :: self._processes.world_size]
        for batch in decoded(self._source, own, self._processor, _BATCH_SIZE):
            broken += [(self._source.key(index), reason) for index, reason in batch.broken.items()]
            if batch.indices:
                yield batch.pixel_values.to(self._processes.device)


def _compare(pixel_values: Tensor, pixels: Tensor) -> Image.Image:
    """Originals over reconstructions."""
    originals, rebuilt = (EvoTokImageProcessor.to_pil(images) for images in (pixel_values, pixels))
    return image_grid(originals + rebuilt, columns=len(originals))
