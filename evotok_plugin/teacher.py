"""The frozen teacher: a vision encoder whose features the semantic decoder learns to predict."""

from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, SiglipVisionModel

from evotok_plugin.configuration_evotok import EvoTokConfig
from evotok_plugin.errors import UserError
from evotok_plugin.model_folder import load_whole, model_type_of, open_config

# SigLIP2 of a fixed resolution has SigLIP's architecture and model_type.
_TEACHER_TYPES = ("siglip", "siglip_vision_model")


class Teacher(nn.Module):
    """The frozen part of a SigLIP vision tower that computes the semantic target: all layers but the last."""

    def __init__(self, tower: SiglipVisionModel) -> None:
        super().__init__()
        self.config, self.embeddings, self.encoder = tower.config, tower.embeddings, tower.encoder
        self.encoder.layers = self.encoder.layers[:-1]
        self.eval().requires_grad_(False)

    @property
    def grid_size(self) -> int:
        """Positions per side; pixels beyond the last complete patch are ignored.

        Raises:
            UserError: images or patches are not square.
        """
        image_size, patch_size = self.config.image_size, self.config.patch_size
        if not isinstance(image_size, int) or not isinstance(patch_size, int):
            raise UserError(f"the teacher's images and patches must be square, got {image_size} and {patch_size}")
        return image_size // patch_size

    def check_fits(self, config: EvoTokConfig, image_size: int | None = None) -> None:
        """Compare the teacher with a tokenizer, for images of `image_size` pixels (default: the configuration's).

        Raises:
            UserError: positions or feature width differ.
        """
        grid_size = (image_size or config.image_size) // config.patch_size
        for what, found, expected in (
            ("patch_size", self.config.patch_size, config.patch_size),
            ("number of positions per side", self.grid_size, grid_size),
            ("width (semantic_dim)", self.config.hidden_size, config.semantic_dim),
        ):
            if found != expected:
                raise UserError(
                    f"the teacher does not fit the tokenizer: expected its {what} to be {expected}, got {found}; give "
                    "the teacher that the tokenizer is or was trained with, or none"
                )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.encoder(inputs_embeds=self.embeddings(pixel_values)).last_hidden_state


def load_teacher(folder: str) -> Teacher:
    """Load the frozen vision tower of SigLIP or SigLIP2.

    Args:
        folder: a folder or hub id, of the vision tower alone or of the full model.

    Raises:
        UserError: it is another kind of model, or weights are missing or damaged.
    """
    kind = model_type_of(folder) if Path(folder).is_dir() else None
    try:
        if kind is None:
            kind = open_config(AutoConfig, folder).model_type
        if kind not in _TEACHER_TYPES:
            variable = " of variable resolution (NaFlex)" if kind.startswith("siglip2") else ""
            raise UserError(f"it holds a {kind or 'nameless'} model{variable}, expected SigLIP of a fixed resolution")
        # The text half is not loaded; pooling head, probe and final norm are never used.
        tower = load_whole(
            SiglipVisionModel,
            folder,
            unused=(r"^text_model\.", r"^logit_(scale|bias)$"),
            not_needed=(r"^(vision_model\.)?(head|post_layernorm)\.",),
        )
    except UserError as error:
        raise UserError(
            f"teacher {folder!r} cannot be loaded: {error}; "
            "give a SigLIP folder, for the paper's recipe a download of google/siglip2-large-patch16-256, "
            "or train without a teacher: --semantic_weight 0, or the recipe photos"
        ) from error
    return Teacher(tower)


def teacher_features(teacher: Teacher, pixel_values: torch.Tensor) -> torch.Tensor:
    """Compute the semantic target (B, N, D): the output of the tower's second-to-last layer."""
    with torch.no_grad():
        return teacher(pixel_values)
