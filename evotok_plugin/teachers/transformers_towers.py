"""Vision transformers of the transformers library as teachers: SigLIP, SigLIP2, CLIP, ViT, DINOv2 and DINOv3.

Layers are indices of transformers' `hidden_states`: 0 is the input of the first layer, -1 the output of the last one,
before the final norm.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    CLIPVisionModel,
    Dinov2Model,
    Dinov2WithRegistersModel,
    DINOv3ViTModel,
    PreTrainedModel,
    Siglip2VisionModel,
    SiglipVisionModel,
    ViTModel,
)
from transformers.image_processing_base import ImageProcessingMixin

from evotok_plugin.errors import UserError
from evotok_plugin.model_folder import load_whole, model_type_of, open_config
from evotok_plugin.teachers.tower import TeacherTower

_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def _no_special(config: Any) -> int:
    return 0


def _class_token(config: Any) -> int:
    return 1


def _class_and_registers(config: Any) -> int:
    return 1 + config.num_register_tokens


@dataclass(frozen=True)
class _Family:
    """Model class, layers and normalization of one kind of vision transformer.

    Attributes:
        layers: path of the list of layers in the model.
        normalization: mean and standard deviation of the pixels if the folder has no image processor.
        num_special: number of tokens before the positions of the image.
        interpolates: whether the forward method has the option `interpolate_pos_encoding`; otherwise positions are
            always interpolated, or rotary.
        unused: patterns of weights beside the vision tower.
        not_needed: patterns of weights behind the last layer.
    """

    model_class: type[PreTrainedModel]
    layers: str
    normalization: tuple[Sequence[float], Sequence[float]]
    num_special: Callable[[Any], int] = _class_token
    interpolates: bool = False
    unused: tuple[str, ...] = ()
    not_needed: tuple[str, ...] = (r"^layernorm\.", r"^norm\.")


_TEXT = (r"^text_model\.", r"^logit_(scale|bias)$", r"^(text|visual)_projection\.")
_HEAD = (r"^(vision_model\.)?(head|post_layernorm)\.",)
_SIGLIP = _Family(
    SiglipVisionModel, "encoder.layers", _HALF, _no_special, interpolates=True, unused=_TEXT, not_needed=_HEAD
)
_SIGLIP2 = _Family(Siglip2VisionModel, "encoder.layers", _HALF, _no_special, unused=_TEXT, not_needed=_HEAD)
_CLIP_FAMILY = _Family(CLIPVisionModel, "encoder.layers", _CLIP, interpolates=True, unused=_TEXT, not_needed=_HEAD)
_VIT_HEAD = (r"^classifier\.", r"^pooler\.", r"^decoder\.")
# SigLIP2 of a fixed resolution has SigLIP's architecture and model_type; "siglip2" is the variant NaFlex.
FAMILIES: dict[str, _Family] = {
    "siglip": _SIGLIP,
    "siglip_vision_model": _SIGLIP,
    "siglip2": _SIGLIP2,
    "siglip2_vision_model": _SIGLIP2,
    "clip": _CLIP_FAMILY,
    "clip_vision_model": _CLIP_FAMILY,
    "vit": _Family(ViTModel, "layers", _HALF, interpolates=True, unused=_VIT_HEAD),
    "dinov2": _Family(Dinov2Model, "encoder.layer", _IMAGENET, unused=_VIT_HEAD),
    "dinov2_with_registers": _Family(
        Dinov2WithRegistersModel, "encoder.layer", _IMAGENET, _class_and_registers, unused=_VIT_HEAD
    ),
    "dinov3_vit": _Family(DINOv3ViTModel, "model.layer", _IMAGENET, _class_and_registers, unused=_VIT_HEAD),
}  # fmt: skip


class TransformersTower(TeacherTower):
    """A vision transformer of the transformers library, truncated after the last layer that is used.

    Attributes:
        kind: `model_type` of its configuration.
    """

    default_layer = -2

    def __init__(self, model: PreTrainedModel, kind: str, name: str) -> None:
        super().__init__()
        self.model, self.kind, self.name, self._family = model, kind, name, FAMILIES[kind]
        config: Any = model.config
        patch, image = config.patch_size, getattr(config, "image_size", None)
        if not isinstance(patch, int) or not isinstance(image, (int, type(None))):
            raise UserError(f"the teacher's images and patches must be square, got {image} and {patch}")
        self._patch, self._num_layers = patch, len(self.blocks) + 1
        # Positions per side of the learned position embeddings.
        self._grid = int(config.num_patches**0.5) if image is None else image // patch
        self.layers = (self.default_layer % self._num_layers,)
        self.eval().requires_grad_(False)

    @property
    def num_special_tokens(self) -> int:
        """Number of class and register tokens before the positions."""
        return self._family.num_special(self.model.config)

    @property
    def blocks(self) -> nn.ModuleList:
        """The layers that are left."""
        return cast(nn.ModuleList, self.model.get_submodule(self._family.layers))

    @property
    def num_layers(self) -> int:
        return self._num_layers

    def stride(self, layer: int) -> int:
        return self._patch

    def width(self, layer: int) -> int:
        return int(self.model.config.hidden_size)

    def used_weights(self) -> dict[str, Tensor]:
        behind = self._family.not_needed
        weights = self.model.state_dict()
        return {name: value for name, value in weights.items() if not any(re.match(one, name) for one in behind)}

    def learned_positions(self) -> int | None:
        return None if self.kind == "dinov3_vit" else self._grid

    def keep_layers(self, layers: Sequence[int]) -> None:
        for layer in layers:
            self.check_layer(layer)
        self.layers = tuple(layer % self.num_layers for layer in layers)
        parent, _, last = self._family.layers.rpartition(".")
        if max(self.layers) > len(self.blocks):
            raise ValueError(f"layer {max(self.layers)} has been freed; load the teacher again")
        setattr(self.model.get_submodule(parent), last, self.blocks[: max(1, *self.layers)])

    def feature_maps(self, pixels: Tensor) -> list[Tensor]:
        grid = (pixels.shape[2] // self._patch, pixels.shape[3] // self._patch)
        with _recorded(self.blocks, self.layers) as states:
            if self._family.model_class is Siglip2VisionModel:
                self.model(**self._naflex_inputs(pixels, grid))
            elif self._family.interpolates:
                self.model(pixels, interpolate_pos_encoding=grid != (self._grid, self._grid))
            else:
                self.model(pixels)
        return [states[layer][:, self.num_special_tokens :].transpose(1, 2).unflatten(2, grid) for layer in self.layers]

    def _naflex_inputs(self, pixels: Tensor, grid: tuple[int, int]) -> dict[str, Tensor]:
        """The inputs of SigLIP2 NaFlex: patches (B, N, P * P * 3), each in the order row, column, channel."""
        batch, patch = pixels.shape[0], self._patch
        rows, columns = grid
        cut = pixels[:, :, : rows * patch, : columns * patch]
        patches = (
            cut.reshape(batch, 3, rows, patch, columns, patch)
            .permute(0, 2, 4, 3, 5, 1)
            .reshape(batch, rows * columns, -1)
        )
        return {
            "pixel_values": patches,
            "pixel_attention_mask": torch.ones(patches.shape[:2], dtype=torch.int32, device=pixels.device),
            "spatial_shapes": torch.tensor([grid] * batch, device=pixels.device),
        }


@contextlib.contextmanager
def _recorded(blocks: nn.ModuleList, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Record hidden states (B, T, D) by index while the model runs."""
    states: dict[int, Tensor] = {}
    handles = []

    def keep(index: int) -> Callable:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            states[index] = output if isinstance(output, Tensor) else output[0]

        return hook

    def keep_first(module: nn.Module, inputs: Any) -> None:
        states[0] = inputs[0]

    for layer in set(layers):
        if layer:
            handles.append(blocks[layer - 1].register_forward_hook(keep(layer)))
        else:
            handles.append(blocks[0].register_forward_pre_hook(keep_first))
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def load_transformers_tower(folder: str) -> TransformersTower:
    """Load the vision tower in a folder or hub repository, of the tower alone or of a full model.

    Raises:
        UserError: another kind of model, or weights that are missing or damaged.
    """
    kind = model_type_of(folder) if Path(folder).is_dir() else open_config(AutoConfig, folder).model_type
    if kind not in FAMILIES:
        known = ", ".join(name for name in FAMILIES if not name.endswith("_vision_model"))
        raise UserError(f"it holds a {kind or 'nameless'} model; expected one of {known}, or timm:NAME")
    family = FAMILIES[kind]
    options = {"add_pooling_layer": False} if family.model_class is ViTModel else {}
    model = load_whole(family.model_class, folder, unused=family.unused, not_needed=family.not_needed, **options)
    tower = TransformersTower(model, kind, folder)
    tower.set_normalization(*_normalization(folder, family))
    return tower


def _normalization(folder: str, family: _Family) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation of the pixels, from the image processor's file if there is one."""
    try:
        values, _ = ImageProcessingMixin.get_image_processor_dict(folder)
    except (OSError, ValueError):
        return family.normalization
    mean, std = values.get("image_mean"), values.get("image_std")
    return (mean, std) if mean and std else family.normalization
