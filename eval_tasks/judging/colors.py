"""The colour of a detected object, as CLIP names it on the object's crop with its surroundings greyed out."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from eval_tasks.judging.rules import Instance
from eval_tasks.judging.vocabulary import COLORS
from eval_tasks.judging.weights import require_weights
from evotok_plugin.common.weight_files import damage_of
from evotok_plugin.errors import UserError
from evotok_plugin.model_folder import check_values, reading

_GROUND = "#999"
_TEMPLATES = ("a photo of a {color} {label}", "a photo of a {color}-colored {label}", "a photo of a {color} object")


def crop(image: Image.Image, instance: Instance) -> Image.Image:
    """An instance's box with everything outside its mask painted grey."""
    ground = Image.new("RGB", image.size, _GROUND)
    return Image.composite(image, ground, Image.fromarray(instance.mask)).crop(instance.box)


@dataclass(frozen=True, eq=False)
class Crop:
    """An object to name the colour of: pixels (3, S, S) as the model sees them, and the object's class."""

    pixels: Tensor
    label: str


class ColorClassifier:
    """CLIP through open_clip; the original judge is ViT-L/14 with OpenAI's weights."""

    def __init__(self, model: torch.nn.Module, transform, tokenizer, device: torch.device | str = "cpu") -> None:
        self.model, self._transform, self._tokenizer = model.to(device).eval(), transform, tokenizer
        self.device = torch.device(device)

    @classmethod
    def open(cls, folder: Path, device: torch.device | str = "cpu") -> "ColorClassifier":
        """Load a folder in open_clip's format (open_clip_config.json beside safetensors).

        Raises:
            UserError: no such folder, or damaged files.
        """
        require_weights(folder, "the colour classifier's weights", "open_clip_config.json")
        try:
            import open_clip
        except ImportError as error:
            raise UserError("colours are judged with open_clip; pip install open_clip_torch") from error
        for file in (folder / "open_clip_config.json", *sorted(folder.glob("*.safetensors"))):
            if cause := damage_of(file):
                raise UserError(f"{file} {cause}")
        name = f"local-dir:{folder.resolve()}"
        with reading(f"the color classifier in {str(folder)!r}", "download the folder again"):
            model, transform = open_clip.create_model_from_pretrained(name, precision="fp32")
            tokenizer = open_clip.get_tokenizer(name)
        check_values(model.state_dict(), f"the color classifier in {str(folder)!r}")
        return cls(model, transform, tokenizer, device)

    def prepare(self, image: Image.Image, instance: Instance) -> Crop:
        """An instance with its mask, as a crop; afterwards the mask is no longer needed."""
        return Crop(self._transform(crop(image, instance)), instance.label)

    @torch.inference_mode()
    def classify(self, crops: Sequence[Crop]) -> list[str]:
        """The colour of each crop, all in one batch."""
        pixels = torch.stack([item.pixels for item in crops]).to(self.device)
        features = F.normalize(self.model.encode_image(pixels), dim=-1)  # (B, D)
        prompts = torch.stack([self._prompts(item.label) for item in crops])  # (B, colours, D)
        return [COLORS[number] for number in (prompts @ features[..., None])[..., 0].argmax(dim=-1).tolist()]

    def _prompts(self, label: str) -> Tensor:
        """One direction a colour (colours, D): the mean of the templates' directions."""
        if label not in self._known_prompts:
            texts = [template.format(color=color, label=label) for color in COLORS for template in _TEMPLATES]
            features = F.normalize(self.model.encode_text(self._tokenizer(texts).to(self.device)), dim=-1)
            self._known_prompts[label] = F.normalize(features.unflatten(0, (len(COLORS), -1)).mean(dim=1), dim=-1)
        return self._known_prompts[label]

    @cached_property
    def _known_prompts(self) -> dict[str, Tensor]:
        return {}
