"""The part of the two image heads in one step of the language model: draw codes, and embed them for the next step.

R rows, G = 2 R with guidance (conditional rows first), N positions, L levels, D width of the language model.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from evotok_plugin import DepthTransformerHead
from evotok_plugin.guidance import guided_logits, scale_at_level
from evotok_plugin.image_head import LevelCache
from evotok_plugin.sampling import SamplingOptions, sample
from llava_ext.flat_head import FlatHead
from llava_ext.generation.model_interface import ModelInterface
from llava_ext.generation.options import DrawingOptions

_KEPT_RANGES = 64


class ImageHeadStepper(ABC):
    """Interface of the image heads to the drawing loop.

    Attributes:
        num_positions: N.
        steps_per_position: steps of the language model per position.
        codes_per_step: codes drawn in each step; steps_per_position * codes_per_step = L.
    """

    def __init__(self, num_positions: int, steps_per_position: int, codes_per_step: int) -> None:
        self.num_positions, self.steps_per_position = num_positions, steps_per_position
        self.codes_per_step = codes_per_step
        self._guided_steps: dict[DrawingOptions, range] = {}

    @property
    def steps_per_image(self) -> int:
        return self.num_positions * self.steps_per_position

    def scales_at(self, step: int, options: DrawingOptions) -> list[float]:
        """Return the guidance scales of the codes of a step, one per code."""
        position, kind = divmod(step, self.steps_per_position)
        levels = range(kind, kind + 1) if self.codes_per_step == 1 else range(self.codes_per_step)
        return [options.scale_at(position, self.num_positions, level) for level in levels]

    def guided_steps(self, options: DrawingOptions) -> range:
        """Return the range from the first step whose guidance scale is not 1 to the last one; empty if there is none.

        Args:
            options: complete.
        """
        if options not in self._guided_steps:
            steps = [n for n in range(self.steps_per_image) if any(one != 1 for one in self.scales_at(n, options))]
            self._guided_steps[options] = range(steps[0], steps[-1] + 1) if steps else range(0)
            while len(self._guided_steps) > _KEPT_RANGES:
                del self._guided_steps[next(iter(self._guided_steps))]
        return self._guided_steps[options]

    @abstractmethod
    def draw(
        self, hidden: Tensor, step: int, noise: Tensor, options: DrawingOptions, scales: Sequence[float] | Tensor
    ) -> Tensor:
        """Draw the codes of a step: hidden (R, D) or (G, D), noise (R, codes_per_step) -> (R, codes_per_step).

        Args:
            options: complete.
            scales: the guidance scales of the codes (`scales_at`), as numbers or as a float32 tensor; if rows have
                their own, as a tensor (R, codes_per_step).
        """

    @abstractmethod
    def embed(self, codes: Tensor, step: int, position: int | Tensor) -> Tensor:
        """Embed the codes (R, codes_per_step) of a step as input of the language model, (R, D).

        Args:
            position: a number, or a tensor of one or of R.
        """


class DepthHeadStepper(ImageHeadStepper):
    """The depth transformer: all levels of a position in every step."""

    def __init__(self, model: ModelInterface) -> None:
        assert isinstance(model.image_head, DepthTransformerHead)
        vision = model.config.vision_config
        super().__init__(vision.num_positions, 1, vision.pixel_depth)
        self._model, self._head = model, model.image_head
        self._cache: LevelCache | None = None

    def draw(
        self, hidden: Tensor, step: int, noise: Tensor, options: DrawingOptions, scales: Sequence[float] | Tensor
    ) -> Tensor:
        codebooks = self._model.vision_tower.quantizer.codebooks
        if self._cache is None or self._cache.keys.shape[1] != hidden.shape[0]:
            self._cache = self._head.new_cache(hidden.shape[0])
        sampling, rescale = _complete(options)
        return self._head.sample(hidden, codebooks, noise, sampling, scales, self._cache, rescale)

    def embed(self, codes: Tensor, step: int, position: int | Tensor) -> Tensor:
        positions = torch.as_tensor(position, device=codes.device).expand(codes.shape[0])
        return self._model.embed_written(codes, positions)


class FlatHeadStepper(ImageHeadStepper):
    """The flat head: one residual token in every step, the levels of a position in turn."""

    def __init__(self, model: ModelInterface) -> None:
        assert isinstance(model.image_head, FlatHead)
        vision = model.config.vision_config
        super().__init__(vision.num_positions, vision.pixel_depth, 1)
        self._head, self._codebooks = model.image_head, model.vision_tower.quantizer.codebooks
        self._rows: dict[int, Tensor] = {}  # rows of the classifiers by level

    def draw(
        self, hidden: Tensor, step: int, noise: Tensor, options: DrawingOptions, scales: Sequence[float] | Tensor
    ) -> Tensor:
        level = step % self.steps_per_position
        if level not in self._rows:
            self._rows[level] = self._head.classifier_rows(level, self._codebooks)
        logits = self._head.states(hidden, level) @ self._rows[level].T
        sampling, rescale = _complete(options)
        if hidden.shape[0] == 2 * noise.shape[0]:
            logits = guided_logits(logits, scale_at_level(scales, 0), rescale)
        return sample(logits, sampling.at_level(level), noise[:, 0])[:, None]

    def embed(self, codes: Tensor, step: int, position: int | Tensor) -> Tensor:
        return self._head.embed_level(codes[:, 0], step % self.steps_per_position, self._codebooks)


def _complete(options: DrawingOptions) -> tuple[SamplingOptions, float]:
    """The sampling and `guidance_rescale` of complete options."""
    assert options.sampling is not None and options.guidance_rescale is not None, "complete the options first"
    return options.sampling, options.guidance_rescale


def stepper_for(model: ModelInterface) -> ImageHeadStepper:
    """Create the stepper for the model's image head."""
    return FlatHeadStepper(model) if model.config.image_head == "flat" else DepthHeadStepper(model)
