"""EvoTok as a vision tower of the LLaVA and LLaVA-NeXT code bases: the tower class and its registration."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evotok_plugin.errors import UserError
from evotok_plugin.model_folder import is_model_folder, load_whole, model_type_of, open_config
from evotok_plugin.plugins.vision_tower import (
    MODEL_TYPES,
    EvoTokVisionConfig,
    EvoTokVisionImageProcessor,
    EvoTokVisionModel,
)


def is_evotok_folder(name: str | Path | None) -> bool:
    """Whether this is the folder of a tokenizer or of a vision tower."""
    if not name or not is_model_folder(name):
        return False
    try:
        return model_type_of(name) in MODEL_TYPES
    except UserError:  # the folder of another tower may hold anything; LLaVA reports what is wrong with it
        return False


class _TowerInCheckpoint(EvoTokVisionModel):
    """A tower inside a LLaVA checkpoint, which may hold only some of the tower's weights.

    transformers initializes the weights that a checkpoint lacks; this class takes them from the tokenizer folder.
    """

    def __init__(self, config: EvoTokVisionConfig, folder: str) -> None:
        super().__init__(config)
        self.folder = folder
        self._values: dict[str, Tensor] = {}

    def _init_weights(self, module: nn.Module) -> None:
        self._values = self._values or load_whole(EvoTokVisionModel, self.folder).state_dict()
        prefix = next(name for name, child in self.named_modules() if child is module)
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            key = f"{prefix}.{name}".lstrip(".")
            if key in self._values and not getattr(tensor, "_is_hf_initialized", False):
                with torch.no_grad():
                    tensor.copy_(self._values[key])
                tensor._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers' own mark
        super()._init_weights(module)  # sets the buffer `position_ids`, which is not saved
        if module is self:  # the last call
            self._values = {}


class EvoTokVisionTower(nn.Module):
    """An EvoTok folder with the interface that LLaVA expects of a vision tower; see `register_llava`.

    Attributes:
        is_loaded: whether the weights are loaded. Inside the `from_pretrained` of a LLaVA model a frozen tower is not
            loaded, even without `delay_load`, because transformers would initialize it at random; LLaVA calls
            `load_model` afterwards. A tower that is trained is part of that model and gets the weights of its
            checkpoint.
        image_processor: an `EvoTokVisionImageProcessor`.
        config: an `EvoTokVisionConfig`.
    """

    vision_tower: EvoTokVisionModel

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
        """Load the weights and freeze them; does nothing if they are already loaded.

        Raises:
            UserError: weights are missing or do not fit.
        """
        if not self.is_loaded:
            tower = load_whole(EvoTokVisionModel, self.vision_tower_name, device_map=device_map)
            self.vision_tower, self.is_loaded = tower.requires_grad_(False), True

    def forward(self, images: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """Features (B, N, D) of images (B, 3, H, W), or a list of (1, N, D) for a list of images (3, H, W).

        Features have the dtype of the images.

        Raises:
            ValueError: the weights are not loaded.
        """
        if isinstance(images, list):
            return [self(image[None]) for image in images]
        model = self._loaded
        return model(images.to(model.device, model.dtype)).last_hidden_state.to(images.dtype)

    @property
    def _loaded(self) -> EvoTokVisionModel:
        if not self.is_loaded:
            raise ValueError(f"the weights of {self.vision_tower_name!r} are not loaded yet; call load_model() first")
        return self.vision_tower

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the weights; codebooks are always in float32."""
        return self._loaded.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self._loaded.device

    @property
    def dummy_feature(self) -> Tensor:
        """Zeros (1, D), for samples without an image."""
        return torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)

    @property
    def hidden_size(self) -> int:
        """Width of the features, D."""
        return self.config.semantic_dim

    @property
    def image_size(self) -> int:
        """Pixels per side."""
        return self.config.image_size

    @property
    def num_patches_per_side(self) -> int:
        """Positions per side."""
        return self.config.grid_size

    @property
    def num_patches(self) -> int:
        """Positions per image, N."""
        return self.config.num_positions


class _TowerBuilder:
    """LLaVA's `build_vision_tower`, extended to build EvoTok towers from EvoTok folders."""

    def __init__(self, original: Callable[..., nn.Module]) -> None:
        self.original = original

    def __call__(self, vision_tower_cfg: Any, **kwargs: Any) -> nn.Module:
        name = getattr(vision_tower_cfg, "mm_vision_tower", getattr(vision_tower_cfg, "vision_tower", None))
        if name and is_evotok_folder(name):
            return EvoTokVisionTower(name, args=vision_tower_cfg, **kwargs)
        return self.original(vision_tower_cfg, **kwargs)


def register_llava() -> None:
    """Make an unmodified LLaVA or LLaVA-NeXT accept EvoTok folders as `--vision_tower`.

    Other vision towers are built as before. May be called repeatedly, before or after `llava` is imported.

    Raises:
        ImportError: `llava` is not installed, or cannot be imported.
    """
    try:
        builder: Any = importlib.import_module("llava.model.multimodal_encoder.builder")
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == "llava"
        what = "is not installed" if absent else f"cannot be imported ({error})"
        raise ImportError(
            f"llava {what}; install the LLaVA or LLaVA-NeXT code base with a transformers that both it and EvoTok "
            "support (5.17 or newer), or call this from within its checkout"
        ) from error
    if not isinstance(builder.build_vision_tower, _TowerBuilder):
        builder.build_vision_tower = _TowerBuilder(builder.build_vision_tower)
    ours = builder.build_vision_tower
    # Modules imported earlier hold the original function by name; modules imported later find ours.
    module: Any
    for name, module in list(sys.modules.items()):
        if name.startswith("llava.") and getattr(module, "build_vision_tower", None) is ours.original:
            module.build_vision_tower = ours
