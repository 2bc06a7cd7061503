"""EvoTok as a vision tower of LLaVA and LLaVA-NeXT: the tower class and its registration."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evotok_plugin.errors import UserError
from evotok_plugin.model_folder import load_whole, model_type_of, open_config
from evotok_plugin.plugins.vision_tower import (
    _MODEL_TYPES,
    EvoTokVisionConfig,
    EvoTokVisionImageProcessor,
    EvoTokVisionModel,
)


def is_evotok_folder(name: str | Path | None) -> bool:
    """Whether this is a folder with a tokenizer or a vision tower in it."""
    if not name or not (Path(name) / "config.json").is_file():
        return False
    try:
        return model_type_of(name) in _MODEL_TYPES
    except ValueError:  # not ours to read: another tower's folder may hold anything
        return False


def _open(folder: str, device_map: Any = None) -> EvoTokVisionModel:
    """The tower of a folder; every weight must be present and fit."""
    return load_whole(EvoTokVisionModel, folder, device_map=device_map)


class _TowerInCheckpoint(EvoTokVisionModel):
    """A tower whose weights come with the LLaVA checkpoint around it, as far as that holds them.

    transformers has what a checkpoint lacks initialized; here that takes the values of the tokenizer's folder.
    """

    def __init__(self, config: EvoTokVisionConfig, folder: str) -> None:
        super().__init__(config)
        self.folder, self._values = folder, {}

    def _init_weights(self, module: nn.Module) -> None:
        self._values = self._values or _open(self.folder).state_dict()
        prefix = next(name for name, child in self.named_modules() if child is module)
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            key = f"{prefix}.{name}".lstrip(".")
            if key in self._values and not getattr(tensor, "_is_hf_initialized", False):
                with torch.no_grad():
                    tensor.copy_(self._values[key])
                tensor._is_hf_initialized = True
        super()._init_weights(module)  # what no folder holds: the places that SigLIP looks its positions up by
        if module is self:  # the last one
            self._values = {}


class EvoTokVisionTower(nn.Module):
    """An EvoTok folder as LLaVA's code asks for a vision tower; see `register_llava`.

    Attributes:
        is_loaded: whether the weights are there. Inside the `from_pretrained` of a LLaVA they are not, even without
            `delay_load`: transformers would put random numbers in their place. LLaVA's own code calls `load_model`
            after it. Only a tower that is trained has its place in that model and gets what its checkpoint holds.
        image_processor: an `EvoTokVisionImageProcessor`.
        config: `EvoTokVisionConfig`.
    """

    def __init__(self, vision_tower: str | Path, args: Any = None, delay_load: bool = False) -> None:
        super().__init__()
        self.vision_tower_name = str(vision_tower)
        self.config = open_config(EvoTokVisionConfig, vision_tower)
        self.config.require_semantics(repr(self.vision_tower_name))
        self.image_processor = EvoTokVisionImageProcessor(self.config.image_size)
        self.is_loaded = False
        tuned = getattr(args, "mm_tunable_parts", None) or ""
        is_trained = getattr(args, "unfreeze_mm_vision_tower", False) or "mm_vision_tower" in tuned
        if torch.empty(0).is_meta:
            if is_trained:
                self.vision_tower, self.is_loaded = _TowerInCheckpoint(self.config, self.vision_tower_name), True
        elif is_trained or not delay_load:
            self.load_model()

    def load_model(self, device_map: Any = None) -> None:
        """Load the frozen weights, once.

        Raises:
            UserError: they are missing or do not fit.
        """
        if not self.is_loaded:
            self.vision_tower = _open(self.vision_tower_name, device_map).requires_grad_(False)
            self.is_loaded = True

    def forward(self, images: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """Features (B, N, D) of images (B, 3, H, W), or (1, N, D) of each image (3, H, W) of a list; in their dtype.

        Raises:
            UserError: the weights are not loaded.
        """
        if isinstance(images, list):
            return [self(image[None]) for image in images]
        model = self._loaded
        return model(images.to(model.device, model.dtype)).last_hidden_state.to(images.dtype)

    @property
    def _loaded(self) -> EvoTokVisionModel:
        if not self.is_loaded:
            raise UserError(f"the weights of {self.vision_tower_name!r} are not loaded yet; call load_model() first")
        return self.vision_tower

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights; codebooks are in float32 always."""
        return self._loaded.dtype

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return self._loaded.device

    @property
    def dummy_feature(self) -> Tensor:
        """Zeros (1, D), for samples without an image."""
        return torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.config.hidden_size

    @property
    def image_size(self) -> int:
        """Pixels a side."""
        return self.config.image_size

    @property
    def num_patches_per_side(self) -> int:
        """Positions a side."""
        return self.config.grid_size

    @property
    def num_patches(self) -> int:
        """N."""
        return self.config.num_positions


class _EvoTokFirst:
    """LLaVA's `build_vision_tower`, except that EvoTok folders become EvoTok towers."""

    def __init__(self, original: Callable[..., nn.Module]) -> None:
        self.original = original

    def __call__(self, vision_tower_cfg: Any, **kwargs) -> nn.Module:
        name = getattr(vision_tower_cfg, "mm_vision_tower", getattr(vision_tower_cfg, "vision_tower", None))
        if is_evotok_folder(name):
            return EvoTokVisionTower(name, args=vision_tower_cfg, **kwargs)
        return self.original(vision_tower_cfg, **kwargs)


def register_llava() -> None:
    """Make LLaVA (or LLaVA-NeXT), as it is, take EvoTok folders as `--vision_tower`; other names it treats as before.

    It does not matter whether `llava` was imported before, nor how often this is called.

    Raises:
        ImportError: `llava` is not installed, or cannot be imported.
    """
    try:
        builder = importlib.import_module("llava.model.multimodal_encoder.builder")
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == "llava"
        what = "is not installed" if absent else f"cannot be imported ({error})"
        raise ImportError(
            f"llava {what}; install the LLaVA or LLaVA-NeXT code base beside a transformers that it and EvoTok run "
            "with (5.17 or newer), or call this from within its checkout"
        ) from error
    if not isinstance(builder.build_vision_tower, _EvoTokFirst):
        builder.build_vision_tower = _EvoTokFirst(builder.build_vision_tower)
    ours = builder.build_vision_tower
    # Modules that were imported before hold the original by name; those to come find ours.
    for name, module in list(sys.modules.items()):
        if name.startswith("llava.") and getattr(module, "build_vision_tower", None) is ours.original:
            module.build_vision_tower = ours
