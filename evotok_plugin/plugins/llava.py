"""EvoTok as a vision tower of the LLaVA and LLaVA-NeXT code bases: the tower class and its registration.

Requires only torch, safetensors, PIL and numpy, so that it runs in the environments that these code bases pin.
"""

import contextlib
import importlib
import io
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evotok_plugin.common.foreign_files import describe_error
from evotok_plugin.plugins.tower_images import TowerImageProcessor
from evotok_plugin.plugins.tower_network import TowerNetwork, TowerSettings, is_evotok_folder, read_settings


class EvoTokVisionTower(nn.Module):
    """An EvoTok folder with the interface that LLaVA expects of a vision tower; see `register_llava`.

    Args:
        vision_tower: folder of a tokenizer, of a tower, or of a model that contains one.
        args: LLaVA's arguments or configuration; whether the tower is trained is read from it.
        delay_load: leave loading to `load_model`.
        pixel_range: values of a black and of a white pixel, by default (-1, 1). Give (0, 1) for hosts that prepare
            images themselves and feed values in that range.

    Attributes:
        is_loaded: whether the weights are loaded. Inside a `from_pretrained` of LLaVA that creates parameters without
            values, a frozen tower is not loaded, even without `delay_load`; LLaVA calls `load_model` afterwards. A
            tower that is trained is part of that model and gets the weights of its checkpoint.
        image_processor: a `TowerImageProcessor`.
        config: a `TowerSettings`.
    """

    vision_tower: TowerNetwork

    def __init__(
        self,
        vision_tower: "str | Path",
        args: Any = None,
        delay_load: bool = False,
        pixel_range: "Sequence[float] | None" = None,
    ) -> None:
        super().__init__()
        self.vision_tower_name = str(vision_tower)
        self.config: TowerSettings = read_settings(vision_tower, pixel_range)
        self.image_processor = TowerImageProcessor(self.config.image_size, self.config.pixel_range)
        self.is_loaded = False
        tuned = getattr(args, "mm_tunable_parts", None) or ""
        is_trained = getattr(args, "unfreeze_mm_vision_tower", False) or "mm_vision_tower" in tuned
        if is_trained or not (delay_load or _parameters_lack_values()):
            self.load_model()

    def load_model(self, device_map: Any = None) -> None:
        """Load the weights and freeze them; does nothing if they are already loaded.

        Args:
            device_map: a device, or {"": device}; the maps that transformers computes ("auto") are ignored, because
                LLaVA moves the tower afterwards.

        Raises:
            UserError: weights are missing or do not fit.
        """
        if self.is_loaded:
            return
        self.vision_tower = TowerNetwork(self.vision_tower_name, self.config).requires_grad_(False)
        self.is_loaded = True
        device = device_map.get("") if isinstance(device_map, dict) else device_map
        if device is not None and device not in ("auto", "balanced", "balanced_low_0", "sequential"):
            self.vision_tower.to(device)

    def forward(self, images: "Tensor | list[Tensor]") -> "Tensor | list[Tensor]":
        """Features (B, N, D) of images (B, 3, H, W), or a list of (1, N, D) for a list of images (3, H, W).

        Features have the dtype of the images.

        Raises:
            ValueError: the weights are not loaded.
        """
        if isinstance(images, list):
            return [self(image[None]) for image in images]
        return self._loaded(images).to(images.dtype)

    @property
    def _loaded(self) -> TowerNetwork:
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


def _parameters_lack_values() -> bool:
    """Whether new parameters have no memory (meta device, accelerate) or are split at once (DeepSpeed ZeRO stage 3)."""
    weight = nn.Linear(1, 1).weight
    return weight.is_meta or hasattr(weight, "ds_id")


class _TowerBuilder:
    """LLaVA's `build_vision_tower`, extended to build EvoTok towers from EvoTok folders."""

    def __init__(self, original: Callable[..., nn.Module]) -> None:
        self.original = original

    def __call__(self, vision_tower_cfg: Any, **kwargs: Any) -> nn.Module:
        name = getattr(vision_tower_cfg, "mm_vision_tower", getattr(vision_tower_cfg, "vision_tower", None))
        if name and is_evotok_folder(name):
            return EvoTokVisionTower(name, args=vision_tower_cfg, **kwargs)
        return self.original(vision_tower_cfg, **kwargs)


def _versions() -> list[str]:
    """The installed versions of the libraries that LLaVA depends on most."""
    found = []
    for name in ("torch", "transformers"):
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return found


def register_llava() -> None:
    """Make an unmodified LLaVA or LLaVA-NeXT accept EvoTok folders as `--vision_tower`.

    Other vision towers are built as before. May be called repeatedly, before or after `llava` is imported.

    Raises:
        ImportError: `llava` is not installed, or cannot be imported.
    """
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            builder: Any = importlib.import_module("llava.model.multimodal_encoder.builder")
    except Exception as error:  # importing llava executes all of its models, which may fail in any way
        if isinstance(error, ModuleNotFoundError) and error.name == "llava":
            raise ImportError(
                "llava is not installed; install the LLaVA or LLaVA-NeXT code base, or call this from its checkout"
            ) from error
        # LLaVA-NeXT prints why a model cannot be imported, and then fails because the model is missing.
        reasons = [line for line in printed.getvalue().splitlines() if "Error:" in line] + [str(error)]
        raise ImportError(
            f"llava cannot be imported: {describe_error(reasons[0])}; install the versions that its pyproject.toml "
            f"pins, found {', '.join(_versions())} (EvoTok's tower itself works with any transformers)"
        ) from error
    finally:
        sys.stdout.write(printed.getvalue())
    if not isinstance(builder.build_vision_tower, _TowerBuilder):
        builder.build_vision_tower = _TowerBuilder(builder.build_vision_tower)
    ours = builder.build_vision_tower
    # Modules imported earlier hold the original function by name; modules imported later find ours.
    module: Any
    for name, module in list(sys.modules.items()):
        if name.startswith("llava.") and getattr(module, "build_vision_tower", None) is ours.original:
            module.build_vision_tower = ours
