"""EvoTok as the vision tower of a LLaVA: in transformers' own classes, and in the LLaVA and LLaVA-NeXT code bases.

transformers knows no entry points for models: what has been imported is there, so `import evotok_plugin` comes first.
After that `LlavaForConditionalGeneration`, `LlavaNextForConditionalGeneration` and
`LlavaOnevisionForConditionalGeneration` take an `EvoTokVisionConfig` as `vision_config`. They must be told that there
is one layer to read and no class token to drop: `vision_feature_layer=-1, vision_feature_select_strategy="full"`.
Pictures that are read in tiles are cut by the image processors of LLaVA-NeXT and OneVision, given the tokenizer's
`image_size` and 0.5 as mean and standard deviation. ViP-LLaVA does not fit: it drops the first position in any case.

B images, N positions, D semantic_dim.
"""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BatchFeature, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import TensorType
from transformers.utils.generic import can_return_tuple

from evotok_plugin.configuration_evotok import EvoTokConfig
from evotok_plugin.encoder import EvoTokEncoder
from evotok_plugin.image_processing_evotok import EvoTokImageProcessor
from evotok_plugin.model_folder import load_whole, model_type_of, open_config
from evotok_plugin.modeling_evotok import EvoTokModel
from evotok_plugin.quantizer import ResidualVectorQuantizer
from evotok_plugin.semantic_decoder import SemanticDecoder


class EvoTokVisionConfig(EvoTokConfig):
    """A tokenizer's configuration under the names by which LLaVA asks for a vision tower's: `hidden_size` is D."""

    model_type = "evotok_vision"
    base_config_key = "vision_config"
    attribute_map = {"hidden_size": "semantic_dim"}

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        """What `from_pretrained` reads of a tokenizer's folder, a saved tower's, or one of a model around them.

        Raises:
            ValueError: there is no EvoTok in it.
        """
        values, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        values = values.get(cls.base_config_key, values)
        if values.get("model_type") not in _MODEL_TYPES:
            raise ValueError(
                f"{str(pretrained_model_name_or_path)!r} holds a {values.get('model_type', 'nameless')} vision tower, "
                f"expected {' or '.join(_MODEL_TYPES)}; give the folder of a tokenizer"
            )
        own = {key: value for key, value in values.items() if key != "architectures"}
        return own | {"model_type": cls.model_type}, kwargs


_MODEL_TYPES = (EvoTokConfig.model_type, EvoTokVisionConfig.model_type)


class EvoTokVisionModel(PreTrainedModel):
    """A tokenizer without its pixel decoder: images in, semantic features out.

    The names of the weights are the tokenizer's, so `from_pretrained` takes a tokenizer's folder as it is. Codebooks
    stay in float32 and never learn here, whatever is trained around them. Where the tower is not frozen the encoder
    gets the gradient that is passed straight through the quantizer.
    """

    config_class = EvoTokVisionConfig
    config: EvoTokVisionConfig
    base_model_prefix = "vision_tower"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _keep_in_fp32_modules_strict = ["quantizer"]  # rounded codebooks would give other codes
    _keys_to_ignore_on_load_unexpected = [r"^pixel_decoder\."]
    _no_split_modules = ["SiglipEncoderLayer", "SemanticBlock"]
    # It attends by SDPA, whatever the language model beside it is told to use.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: EvoTokVisionConfig) -> None:
        config.require_semantics(f"the vision tower {config.name_or_path!r}")
        super().__init__(config)
        self.encoder = EvoTokEncoder(config)
        quantizer = ResidualVectorQuantizer(config.num_quantizers, config.codebook_size, config.codebook_dim)
        self.quantizer = quantizer.float().eval()  # also where models are made in half precision
        self.semantic_decoder = SemanticDecoder(config)
        self.post_init()

    _init_weights = EvoTokModel._init_weights
    grid_of = EvoTokModel.grid_of

    def train(self, mode: bool = True) -> "EvoTokVisionModel":
        """The quantizer stays in evaluation mode: its codebooks never move here."""
        super().train(mode)
        self.quantizer.eval()
        return self

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | int | list[int] | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """Semantic features `last_hidden_state` (B, N, D) of images (B, 3, H, W) in [-1, 1].

        Args:
            output_hidden_states: True, or the layers that are wanted: `hidden_states` then holds one layer, the
                semantic features.
            kwargs: what LLaVA passes on to every tower and this one has no use for.

        Raises:
            ValueError: height or width is no multiple of the patch size, or there is no such layer.
        """
        grid, depth = self.grid_of(pixel_values), self.config.semantic_depth
        hidden_wanted = output_hidden_states is not None and output_hidden_states is not False  # 0 is a layer
        layers = output_hidden_states if isinstance(output_hidden_states, (list, tuple)) else [output_hidden_states]
        if missing := [layer for layer in layers if not isinstance(layer, bool) and layer not in (None, -1, 0)]:
            raise ValueError(
                f"vision_feature_layer {missing[0]}: EvoTok has one layer to read, its semantic features, and no class "
                'token; set vision_feature_layer=-1 and vision_feature_select_strategy="full" in the configuration'
            )
        quantized = self.quantizer(self.encoder(pixel_values), depth)
        features = self.semantic_decoder(quantized.latents_at(depth).to(self.dtype), grid)
        return BaseModelOutputWithPooling(
            last_hidden_state=features, hidden_states=(features,) if hidden_wanted else None
        )


class EvoTokVisionImageProcessor(BaseImageProcessor):
    """EvoTok's image processor as LLaVA's code asks for one: sizes are dictionaries, mean and deviation are known.

    `from_pretrained` reads a tokenizer's folder, too. Images may come in nested lists, as chat templates give them, and
    the frames of a video as one array (F, H, W, 3), as LLaVA-NeXT hands them over.
    """

    model_input_names = ["pixel_values"]

    def __init__(self, size: int | dict[str, int] = 256, **kwargs) -> None:
        super().__init__(**kwargs)
        edge = size["shortest_edge"] if isinstance(size, dict) else size
        self.size, self.crop_size = {"shortest_edge": edge}, {"height": edge, "width": edge}
        self.image_mean, self.image_std = [0.5] * 3, [0.5] * 3

    def __call__(self, images, return_tensors: str | TensorType | None = "pt", **kwargs) -> BatchFeature:
        return self.preprocess(images, return_tensors=return_tensors, **kwargs)

    def preprocess(self, images, return_tensors: str | TensorType | None = "pt", **kwargs) -> BatchFeature:
        """Prepare images, nested lists of them or frames as `EvoTokImageProcessor.preprocess` does.

        Raises:
            ValueError: not an image, none at all, or a keyword that is not supported.
        """
        processor = EvoTokImageProcessor(size=self.size["shortest_edge"])
        return processor.preprocess(images, return_tensors=return_tensors, **kwargs)


# The LLaVA and LLaVA-NeXT code bases ---------------------------------------------------------------------------


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
            ValueError: they are missing or do not fit.
        """
        if not self.is_loaded:
            self.vision_tower = _open(self.vision_tower_name, device_map).requires_grad_(False)
            self.is_loaded = True

    def forward(self, images: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """Features (B, N, D) of images (B, 3, H, W), or (1, N, D) of each image (3, H, W) of a list; in their dtype.

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
