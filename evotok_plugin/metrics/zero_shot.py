"""Zero-shot classification with the text tower of a SigLIP teacher: images are classified by the names of classes.

The semantic features of a tokenizer replace the output of the teacher's second-to-last layer; the teacher's last layer,
final norm and pooling head turn them into an image embedding, which is compared with the embeddings of class names.

B images, N positions, D width, C classes.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import SiglipModel

from evotok_plugin.common.foreign_files import read_json
from evotok_plugin.errors import UserError
from evotok_plugin.model_folder import load_whole, model_type_of, open_tokenizer_folder

_TEMPLATE = "a photo of a {name}"
_IDENTIFIER = re.compile(r"[a-z]\d{5,}|\d+")  # names of folders that are no words, such as n01440764


class ZeroShotClassifier(nn.Module):
    """The parts of a SigLIP that classify images by names: text tower, last vision layer, final norm, pooling head."""

    def __init__(self, siglip: SiglipModel, tokenizer: Any) -> None:
        super().__init__()
        tower = siglip.vision_model
        self.last_layer, self.post_layernorm, self.head = tower.encoder.layers[-1], tower.post_layernorm, tower.head
        self.text_model, self._tokenizer = siglip.text_model, tokenizer
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def embed_names(self, names: Sequence[str]) -> Tensor:
        """Embeddings (C, D) of length 1 of "a photo of a NAME".

        Raises:
            UserError: the tokenizer has ids that the text tower lacks.
        """
        embeddings = self.text_model.embeddings.token_embedding
        length = self.text_model.config.max_position_embeddings
        texts = [_TEMPLATE.format(name=name.replace("_", " ").lower()) for name in names]
        # SigLIP was trained on texts padded to the full length, without an attention mask.
        ids = self._tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        ids = ids["input_ids"].to(embeddings.weight.device)
        if int(ids.max()) >= embeddings.num_embeddings:
            raise UserError(
                f"the teacher's tokenizer has ids up to {int(ids.max())}, its text tower {embeddings.num_embeddings}; "
                "give a folder whose tokenizer belongs to the model"
            )
        return F.normalize(self.text_model(input_ids=ids).pooler_output, dim=-1)

    @torch.no_grad()
    def embed_features(self, features: Tensor) -> Tensor:
        """Embeddings (B, D) of length 1 of features (B, N, D) of the second-to-last layer."""
        hidden = self.last_layer(features, attention_mask=None)
        return F.normalize(self.head(self.post_layernorm(hidden)), dim=-1)


def has_text_tower(folder: str) -> bool:
    """Whether a local folder holds a complete SigLIP with a text tower, and a tokenizer."""
    path = Path(folder)
    names = ("tokenizer.json", "tokenizer_config.json", "spiece.model")
    return path.is_dir() and model_type_of(path) == "siglip" and any((path / name).is_file() for name in names)


def load_zero_shot(folder: str) -> ZeroShotClassifier:
    """Load the classifier of a SigLIP folder.

    Raises:
        UserError: the folder has no text tower or no tokenizer, or its weights are damaged.
    """
    if not has_text_tower(folder):
        raise UserError(f"{folder!r}: expected a complete SigLIP with its text tower and tokenizer")
    return ZeroShotClassifier(load_whole(SiglipModel, folder), open_tokenizer_folder(folder))


def read_class_names(file: Path) -> dict[str, str]:
    """Read the names of classes, a JSON object from folder names to words.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    names = read_json(file, remedy='write {"n01440764": "tench", ...}')
    if not names or not all(isinstance(name, str) and name.strip() for name in names.values()):
        raise UserError(f'{file}: expected names by folder, {{"n01440764": "tench", ...}}')
    return names


def unnamed(labels: Iterable[str], names: Mapping[str, str]) -> list[str]:
    """The labels without a name in words: not in `names`, and an identifier such as n01440764."""
    return sorted({label for label in labels if label not in names and _IDENTIFIER.fullmatch(label)})
