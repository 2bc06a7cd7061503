"""Colors of detected objects: CLIP classifies the crop of an object whose surroundings are grayed out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from eval_tasks.judging.clip import load_clip
from eval_tasks.judging.rules import Instance
from eval_tasks.judging.vocabulary import COLORS

WHAT = "the color classifier"  # in messages
_GROUND = "#999"
_TEMPLATES = ("a photo of a {color} {label}", "a photo of a {color}-colored {label}", "a photo of a {color} object")


def crop(image: Image.Image, instance: Instance) -> Image.Image:
    """Crop an image to an instance's box and paint everything outside its mask gray."""
    assert instance.mask is not None, "colors need the instance's mask"
    ground = Image.new("RGB", image.size, _GROUND)
    return Image.composite(image, ground, Image.fromarray(instance.mask)).crop(instance.box)


@dataclass(frozen=True, eq=False)
class Crop:
    """The crop of an object: preprocessed pixels (3, S, S), and the object's class."""

    pixels: Tensor
    label: str


class ColorClassifier:
    """Color classification with CLIP through open_clip; the original judge is ViT-L/14 with OpenAI's weights."""

    def __init__(
        self,
        model: Any,  # open_clip's CLIP
        transform: Callable[[Image.Image], Tensor],
        tokenizer: Callable[[list[str]], Tensor],
        device: torch.device | str = "cpu",
    ) -> None:
        self.model, self._transform, self._tokenizer = model.to(device).eval(), transform, tokenizer
        self.device = torch.device(device)

    @classmethod
    def open(cls, folder: Path, device: torch.device | str = "cpu") -> "ColorClassifier":
        """Load a folder in open_clip's format (open_clip_config.json and safetensors).

        Raises:
            UserError: the folder is missing, incomplete or damaged, or open_clip is not installed.
        """
        clip = load_clip(folder, WHAT)
        return cls(clip.model, clip.transform, clip.tokenizer, device)

    def prepare(self, image: Image.Image, instance: Instance) -> Crop:
        """Crop an instance by its mask, which is not needed afterwards."""
        return Crop(self._transform(crop(image, instance)), instance.label)

    @torch.inference_mode()
    def classify(self, crops: Sequence[Crop]) -> list[str]:
        """Classify all crops in one batch."""
        pixels = torch.stack([item.pixels for item in crops]).to(self.device)
        features = F.normalize(self.model.encode_image(pixels), dim=-1)  # (B, D)
        prompts = torch.stack([self._prompts(item.label) for item in crops])  # (B, colors, D)
        return [COLORS[number] for number in (prompts @ features[..., None])[..., 0].argmax(dim=-1).tolist()]

    def _prompts(self, label: str) -> Tensor:
        """One unit vector per color (colors, D): the normalized mean over the templates."""
        if label not in self._known_prompts:
            texts = [template.format(color=color, label=label) for color in COLORS for template in _TEMPLATES]
            features = F.normalize(self.model.encode_text(self._tokenizer(texts).to(self.device)), dim=-1)
            self._known_prompts[label] = F.normalize(features.unflatten(0, (len(COLORS), -1)).mean(dim=1), dim=-1)
        return self._known_prompts[label]

    @cached_property
    def _known_prompts(self) -> dict[str, Tensor]:
        return {}
