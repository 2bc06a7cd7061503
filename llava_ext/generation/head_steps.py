"""What the two image heads do in a step of the language model.

R rows, G = 2 R with guidance (conditional rows first), N positions, L levels, D width of the language model.
"""

import torch
from torch import Tensor

from evotok_plugin.sampling import SamplingOptions, sample
from llava_ext.generation.options import DrawingOptions


class ImageHeadStepper:
    """What both have in common.

    Attributes:
        num_positions: N.
        steps_per_position, codes_per_step: of the language model and the codes drawn in each; together L.
    """

    def __init__(self, num_positions: int, steps_per_position: int, codes_per_step: int) -> None:
        self.num_positions, self.steps_per_position = num_positions, steps_per_position
        self.codes_per_step = codes_per_step

    @property
    def steps_per_image(self) -> int:
        return self.num_positions * self.steps_per_position

    def scale_at(self, step: int, options: DrawingOptions) -> float:
        """The guidance scale in a step of an image, the same for all levels of a position."""
        return options.scale_at(step // self.steps_per_position, self.num_positions)


class DepthHeadStepper(ImageHeadStepper):
    """All levels of one position in every step."""

    def __init__(self, model) -> None:
        vision = model.config.vision_config
        super().__init__(vision.num_positions, 1, vision.pixel_depth)
        self._model, self._cache = model, None

    def draw(
        self, hidden: Tensor, step: int, noise: Tensor, sampling: SamplingOptions, scale: float | Tensor
    ) -> Tensor:
        """The codes of this step: hidden (R, D) or (G, D), noise (R, L) -> (R, L)."""
        head, codebooks = self._model.image_head, self._model.vision_tower.quantizer.codebooks
        if self._cache is None or self._cache.keys.shape[1] != hidden.shape[0]:
            self._cache = head.new_cache(hidden.shape[0])
        return head.sample(hidden, codebooks, noise, sampling, scale, self._cache)

    def embed(self, codes: Tensor, step: int, position: int | Tensor) -> Tensor:
        """What the language model reads of codes (R, L) drawn at a position, a number or a tensor of one: (R, D)."""
        place = torch.as_tensor(position, device=codes.device).expand(codes.shape[0])
        return self._model.embed_written(codes, place)


class FlatHeadStepper(ImageHeadStepper):
    """One residual token in every step, the levels of a position in turn."""

    def __init__(self, model) -> None:
        vision = model.config.vision_config
        super().__init__(vision.num_positions, vision.pixel_depth, 1)
        self._head, self._codebooks = model.image_head, model.vision_tower.quantizer.codebooks
        self._rows: dict[int, Tensor] = {}  # of the levels' classifiers

    def draw(
        self, hidden: Tensor, step: int, noise: Tensor, sampling: SamplingOptions, scale: float | Tensor
    ) -> Tensor:
        """The code of this step: hidden (R, D) or (G, D), noise (R, 1) -> (R, 1)."""
        level = step % self.steps_per_position
        if level not in self._rows:
            self._rows[level] = self._head.classifier_rows(level, self._codebooks)
        logits = self._head.states(hidden, level) @ self._rows[level].T
        if hidden.shape[0] == 2 * noise.shape[0]:
            conditional, unconditional = logits.float().chunk(2)
            logits = torch.lerp(unconditional, conditional, scale)
        return sample(logits, sampling.at_level(level), noise[:, 0])[:, None]

    def embed(self, codes: Tensor, step: int, position: int | Tensor) -> Tensor:
        """What the language model reads of a code (R, 1) drawn in a step, wherever that is: (R, D)."""
        return self._head.embed_level(codes[:, 0], step % self.steps_per_position, self._codebooks)


def stepper_for(model) -> DepthHeadStepper | FlatHeadStepper:
    """The one that fits the model's image head."""
    return (FlatHeadStepper if model.config.image_head == "flat" else DepthHeadStepper)(model)
