"""The frozen teacher: the vision encoder whose features the semantic decoder learns to predict."""

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
    """The frozen part of a SigLIP vision tower that makes the semantic target: all layers but the last one."""

    def __init__(self, tower: SiglipVisionModel) -> None:
        super().__init__()
        self.config, self.embeddings, self.encoder = tower.config, tower.embeddings, tower.encoder
        self.encoder.layers = self.encoder.layers[:-1]
        self.eval().requires_grad_(False)

    @property
    def grid_size(self) -> int:
        """Positions a side; pixels beyond the last whole patch are not read."""
        return self.config.image_size // self.config.patch_size

    def check_fits(self, config: EvoTokConfig, image_size: int | None = None) -> None:
        """Compare it with a tokenizer, for images of `image_size` pixels (default: the configuration's).

        Raises:
            UserError: it has other positions, or features of another width.
        """
        grid_size = (image_size or config.image_size) // config.patch_size
        for what, theirs, ours in (
            ("patch_size", self.config.patch_size, config.patch_size),
            ("positions a side", self.grid_size, grid_size),
            ("width (semantic_dim)", self.config.hidden_size, config.semantic_dim),
        ):
            if theirs != ours:
                raise UserError(
                    f"the teacher does not fit the tokenizer: its {what} is {theirs}, {ours} is needed; give the "
                    "teacher that the tokenizer learns or has learnt from, or do without one"
                )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.encoder(inputs_embeds=self.embeddings(pixel_values)).last_hidden_state


def load_teacher(folder: str) -> Teacher:
    """The frozen vision tower of a SigLIP or SigLIP2 folder or hub id, of the tower alone or of the whole model.

    Raises:
        UserError: it is another kind of model, or cannot be loaded whole.
    """
    try:
        kind = model_type_of(folder) if Path(folder).is_dir() else open_config(AutoConfig, folder).model_type
        if kind not in _TEACHER_TYPES:
            variable = " of variable resolution (NaFlex)" if kind.startswith("siglip2") else ""
            raise UserError(f"it holds a {kind or 'nameless'} model{variable}, expected SigLIP of a fixed resolution")
        # The text half is not loaded; the pooling head, the last layer's norm and the head's probe are never used.
        tower = load_whole(
            SiglipVisionModel,
            folder,
            unused=(r"^text_model\.", r"^logit_(scale|bias)$"),
            not_needed=(r"^(vision_model\.)?(head|post_layernorm)\.",),
        )
    except ValueError as error:
        raise UserError(
            f"teacher {folder!r} cannot be loaded: {error}; "
            "give a SigLIP folder, for the paper's recipe a download of google/siglip2-large-patch16-256, "
            "or train without one: --semantic_weight 0, or the recipe photos"
        ) from error
    return Teacher(tower)


def teacher_features(teacher: Teacher, pixel_values: torch.Tensor) -> torch.Tensor:
    """The semantic target (B, N, D): output of the tower's last layer but one."""
    with torch.no_grad():
        return teacher(pixel_values)
