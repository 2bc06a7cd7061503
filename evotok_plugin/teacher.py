"""The frozen teacher: a vision encoder whose features the semantic decoder learns to predict.

B batch, N positions, D width of the features.
"""

import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evotok_plugin.common.files import write_text
from evotok_plugin.common.foreign_files import read_json
from evotok_plugin.configuration_evotok import EvoTokConfig
from evotok_plugin.errors import UserError
from evotok_plugin.model_folder import model_type_of
from evotok_plugin.teachers.layers import TeacherLayers
from evotok_plugin.teachers.timm_towers import PREFIX, load_timm_tower
from evotok_plugin.teachers.tower import TeacherTower
from evotok_plugin.teachers.transformers_towers import load_transformers_tower

logger = logging.getLogger(__name__)

RECORD = "teacher.json"
"""File in a tokenizer folder with the settings and statistics of the teacher that it was trained with."""


@dataclass(frozen=True)
class TeacherSettings:
    """Layers, image size and scaling of a teacher's features.

    Attributes:
        layers: see `TeacherLayers`; by default the second-to-last layer of a ViT, the last stage of a CNN.
        size: height and width in pixels at which the teacher sees the images; by default the size at which it has
            the tokenizer's positions.
        standardize: whether the features have mean 0 and standard deviation 1 in every channel.
    """

    layers: str | None = None
    size: int | None = None
    standardize: bool = False


class Teacher(nn.Module):
    """A frozen vision network with features (B, N, D) at the tokenizer's positions.

    `fit_to` a tokenizer, which chooses the size of the images, and `fit_statistics` if the features are standardized.
    Without `fit_to` the teacher sees images as they are, and its positions are its own.

    Attributes:
        statistics: mean and standard deviation of the channels (D,) by depth, if the features are standardized.
        remember: a cache: given the images and the computation, it returns the features.

    Raises:
        UserError: a layer does not exist, or layers with different widths are summed.
    """

    def __init__(self, tower: TeacherTower, settings: TeacherSettings | None = None) -> None:
        super().__init__()
        self.tower, self.settings = tower, settings or TeacherSettings()
        self._layers = TeacherLayers.parse(self.settings.layers or str(tower.default_layer))
        for layers in self._layers.by_depth.values():
            for layer in layers:
                tower.check_layer(layer)
            if len(widths := {tower.width(layer) for layer in layers}) > 1:
                raise UserError(
                    f"teacher_layer {self.settings.layers}: layers that are summed must have the same width, got "
                    f"{' and '.join(map(str, sorted(widths)))} channels"
                )
        self._depths: dict[int, tuple[int, ...]] = {}
        self._positions = self._size = 0  # set by fit_to
        self._patch_size = tower.stride(self._main_layers[0])
        tower.layers = tuple(layer % tower.num_layers for layer in self._main_layers)
        self.remember: Callable[[Tensor, Callable[[Tensor], list[Tensor]]], list[Tensor]] | None = None
        self.statistics: dict[int, tuple[Tensor, Tensor]] = {}
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in evaluation mode."""
        return super().train(False)

    @property
    def width(self) -> int:
        """D, the width of the features at `semantic_depth`."""
        return self.tower.width(self._main_layers[0])

    @property
    def _main_layers(self) -> tuple[int, ...]:
        return list(self._depths.values() or self._layers.by_depth.values())[-1]

    @property
    def extra_depths(self) -> dict[int, int]:
        """Depths other than `semantic_depth` that have targets, with the widths of their features."""
        return {depth: self.tower.width(layers[0]) for depth, layers in list(self._depths.items())[:-1]}

    def fit_to(self, config: EvoTokConfig, image_size: int | None = None) -> None:
        """Choose the teacher's image size for a tokenizer, for images of `image_size` pixels (default: its own).

        Raises:
            UserError: the teacher cannot have the tokenizer's positions, or its features have another width.
        """
        self._depths = self._layers.at(config.semantic_depth, config.num_quantizers)
        stride = self.tower.stride(self._main_layers[0])
        positions = (image_size or config.image_size) // config.patch_size
        size = self.settings.size or positions * stride
        if size // stride != positions:
            raise UserError(
                f"the teacher does not fit the tokenizer: expected {positions}x{positions} positions, got "
                f"{size // stride}x{size // stride} from images of {size} pixels and {stride} pixels per position; "
                f"set teacher_size to {positions * stride}, or omit it"
            )
        if self.width != config.semantic_dim:
            raise UserError(
                "the teacher does not fit the tokenizer: expected its width (semantic_dim) to be "
                f"{config.semantic_dim}, got {self.width}; give the teacher that the tokenizer is or was trained with, "
                "or none"
            )
        learned = self.tower.learned_positions()
        if learned not in (None, positions):
            logger.info(
                "the teacher's position embeddings are interpolated from %dx%d to %dx%d",
                *[learned] * 2,
                *[positions] * 2,
            )
        self._positions, self._patch_size, self._size = positions, config.patch_size, size
        self.tower.keep_layers([layer for layers in self._depths.values() for layer in layers])

    def forward(self, pixel_values: Tensor) -> Tensor:
        """The features (B, N, D) at `semantic_depth`, for images (B, 3, H, W) in [-1, 1]."""
        return list(self.targets(pixel_values).values())[-1]

    def targets(self, pixel_values: Tensor) -> dict[int, Tensor]:
        """The features (B, N, D) by depth; the last is `semantic_depth`.

        Raises:
            UserError: the features are to be standardized, but their statistics are not known.
        """
        targets = self._raw_targets(pixel_values)
        if not self.settings.standardize:
            return targets
        if not self.statistics:
            raise UserError(
                "the teacher's features are standardized, but their means and standard deviations are not known; "
                f"evaluate with the {RECORD} of the tokenizer's folder"
            )
        return {depth: self._standardized(features, depth) for depth, features in targets.items()}

    def _standardized(self, features: Tensor, depth: int) -> Tensor:
        mean, std = (values.to(features.device) for values in self.statistics[depth])
        return (features.float() - mean) / std

    def _raw_targets(self, pixel_values: Tensor) -> dict[int, Tensor]:
        depths = self._depths or {0: self._main_layers}
        if self.remember is not None:
            return dict(zip(depths, self.remember(pixel_values, self._features), strict=True))
        return dict(zip(depths, self._features(pixel_values), strict=True))

    def _features(self, pixel_values: Tensor) -> list[Tensor]:
        """The features (B, N, D) of every depth."""
        rows, columns = (side // self._patch_size for side in pixel_values.shape[2:])
        maps = iter(self.tower.feature_maps(self._pixels(pixel_values, rows, columns)))
        targets = []
        for layers in self._depths.values() or [self._main_layers]:
            total = sum(self._at_positions(next(maps), rows, columns) for _ in layers)
            assert isinstance(total, Tensor)
            targets.append(total.flatten(2).transpose(1, 2))
        return targets

    def _pixels(self, pixel_values: Tensor, rows: int, columns: int) -> Tensor:
        """Images at the teacher's size, normalized as it expects."""
        size = tuple(pixel_values.shape[2:])
        if self._positions:
            size = (self._size * rows // self._positions, self._size * columns // self._positions)
        if size != tuple(pixel_values.shape[2:]):
            pixel_values = F.interpolate(pixel_values, size, mode="bicubic", antialias=True, align_corners=False)
            pixel_values = pixel_values.clamp(-1, 1)
        if self.tower.takes_signed_pixels:
            return pixel_values
        return ((pixel_values + 1) / 2 - self.tower.mean.view(3, 1, 1)) / self.tower.std.view(3, 1, 1)

    def _at_positions(self, features: Tensor, rows: int, columns: int) -> Tensor:
        """Average a finer map (B, D, h, w) over the tokenizer's positions.

        Raises:
            UserError: the map cannot be divided into the positions.
        """
        found = tuple(features.shape[2:])
        if found == (rows, columns):
            return features
        if found[0] % rows or found[1] % columns:
            raise UserError(
                f"the teacher has {found[0]}x{found[1]} positions, which cannot be averaged to the tokenizer's "
                f"{rows}x{columns}; choose another teacher_size or teacher_layer"
            )
        return F.adaptive_avg_pool2d(features, (rows, columns))

    @torch.no_grad()
    def fit_statistics(self, batches: Iterable[Tensor]) -> None:
        """Measure mean and standard deviation of every channel on images (B, 3, H, W) in [-1, 1].

        Raises:
            UserError: there are no images.
        """
        sums: dict[int, Tensor] = {}
        for pixel_values in batches:
            for depth, features in self._raw_targets(pixel_values).items():
                flat = features.flatten(0, 1).double()
                ones = torch.full_like(flat[0], flat.shape[0])
                part = torch.stack([flat.sum(0), flat.square().sum(0), ones]).cpu()
                sums[depth] = sums[depth] + part if depth in sums else part
        if not sums:
            raise UserError("the teacher's features cannot be standardized without images; raise kmeans_images")
        for depth, (total, squares, count) in sums.items():
            mean = total / count
            std = (squares / count - mean.square()).clamp_min(0).sqrt()
            # A channel that is constant on these images carries nothing; it stays near 0 instead of being blown up.
            std = torch.where(std > 1e-6 * std.max(), std, torch.ones_like(std))
            self.statistics[depth] = (mean.float(), std.float())

    def record(self, folder: Path) -> None:
        """Write the settings and statistics to `teacher.json`, for evaluations of the tokenizer."""
        statistics = {
            str(depth): {"mean": mean.tolist(), "std": std.tolist()} for depth, (mean, std) in self.statistics.items()
        }
        settings = {"layers": self.settings.layers, "size": self.settings.size, "statistics": statistics}
        write_text(folder / RECORD, json.dumps(settings) + "\n")


def load_teacher(spec: str, settings: TeacherSettings | None = None) -> Teacher:
    """Load a frozen vision network.

    Args:
        spec: a folder or hub id of SigLIP, SigLIP2, CLIP, ViT, DINOv2 or DINOv3, of the vision tower alone or of the
            full model; or `timm:NAME` or `timm:NAME:FILE`.

    Raises:
        UserError: it is another kind of model, weights are missing or damaged, or a layer does not exist.
    """
    if not spec.startswith(PREFIX) and Path(spec).is_dir():
        model_type_of(spec)  # its errors name the file, and need no advice on teachers
    try:
        tower = load_timm_tower(spec) if spec.startswith(PREFIX) else load_transformers_tower(spec)
    except UserError as error:
        raise UserError(
            f"teacher {spec!r} cannot be loaded: {error}; "
            "give a folder of SigLIP, SigLIP2, CLIP, ViT, DINOv2 or DINOv3, or timm:NAME (for the paper's recipe "
            "a download of google/siglip2-large-patch16-256), "
            "or train without a teacher: --semantic_weight 0, or the recipe photos"
        ) from error
    return Teacher(tower, settings)


def load_recorded_teacher(spec: str, tokenizer_folder: str | Path | None) -> Teacher:
    """Load a teacher as a tokenizer was trained with it: with the settings and statistics in its `teacher.json`.

    Raises:
        UserError: as `load_teacher`, or the file is damaged.
    """
    file = Path(tokenizer_folder or "") / RECORD
    if not tokenizer_folder or not file.is_file():
        return load_teacher(spec)
    values = read_json(file)
    try:
        statistics = {
            int(depth): (torch.tensor(one["mean"]), torch.tensor(one["std"]))
            for depth, one in values["statistics"].items()
        }
        settings = TeacherSettings(values["layers"], values["size"], bool(statistics))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{file} is damaged ({error!r}); restore it, or delete it to use the default layer") from error
    teacher = load_teacher(spec, settings)
    teacher.statistics = statistics
    return teacher


def teacher_features(teacher: Teacher, pixel_values: Tensor) -> Tensor:
    """Compute the semantic target (B, N, D), in general the output of the tower's second-to-last layer."""
    with torch.no_grad():
        return teacher(pixel_values)
