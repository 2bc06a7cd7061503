"""CLIP through open_clip, from a local folder or the hub, and CLIPScore."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn import functional as F

from eval_tasks.judging.options import JudgeOptions, variable
from eval_tasks.judging.weights import fetch, require_weights
from evotok_plugin.common.foreign_files import reading
from evotok_plugin.common.weight_checks import check_values
from evotok_plugin.common.weight_files import damage_of
from evotok_plugin.errors import UserError

_CONFIG = "open_clip_config.json"
_FILES = (_CONFIG, "open_clip_model.safetensors", "tokenizer*.json", "*.txt")
_SCALE = 2.5  # CLIPScore's factor, which stretches the usual similarities to about 0..1


def find_clip(options: JudgeOptions, what: str) -> Path:
    """Locate the folder of the option `clip`, downloading it if necessary.

    Args:
        what: for the error: a name of the model by its purpose, such as "the color classifier".

    Raises:
        UserError: the folder or one of its files is missing.
    """
    weights = f"{what}'s weights"
    return require_weights(fetch(options.clip, weights, variable("clip"), _FILES), weights, _CONFIG)


@dataclass(frozen=True, eq=False)
class OpenClip:
    """A CLIP with the preprocessing of its images and texts."""

    model: Any  # open_clip's CLIP
    transform: Callable[[Image], Tensor]
    tokenizer: Callable[[list[str]], Tensor]


def load_clip(folder: Path, what: str) -> OpenClip:
    """Load a folder in open_clip's format (open_clip_config.json and safetensors).

    Args:
        what: as for `find_clip`.

    Raises:
        UserError: the folder is missing, incomplete or damaged, or open_clip is not installed.
    """
    require_weights(folder, f"{what}'s weights", _CONFIG)
    try:
        import open_clip
    except ImportError as error:
        raise UserError(f"{what} needs open_clip: pip install open_clip_torch") from error
    for file in (folder / _CONFIG, *sorted(folder.glob("*.safetensors"))):
        if cause := damage_of(file):
            raise UserError(f"{file} {cause}")
    name = f"local-dir:{folder.resolve()}"
    with reading(f"{what} in {str(folder)!r}", "download the folder again"):
        model, transform = open_clip.create_model_from_pretrained(name, precision="fp32")
        tokenizer = open_clip.get_tokenizer(name)
    check_values(model.state_dict(), f"{what} in {str(folder)!r}")
    return OpenClip(model, transform, tokenizer)


class ClipScorer:
    """CLIPScore (arXiv 2104.08718): 2.5 * max(cosine similarity of image and text, 0)."""

    def __init__(self, clip: OpenClip, device: torch.device | str = "cpu") -> None:
        self._clip, self._device = clip, torch.device(device)
        self._model = clip.model.to(device).eval()

    @torch.inference_mode()
    def score(self, images: Sequence[Image], texts: Sequence[str]) -> list[float]:
        """Score each image for its text, all in one batch; scores are in [0, 2.5]."""
        pixels = torch.stack([self._clip.transform(image) for image in images]).to(self._device)
        tokens = self._clip.tokenizer(list(texts)).to(self._device)
        features = F.normalize(self._model.encode_image(pixels), dim=-1)  # (B, D)
        wanted = F.normalize(self._model.encode_text(tokens), dim=-1)
        return (_SCALE * (features * wanted).sum(dim=-1).clamp(min=0)).tolist()
