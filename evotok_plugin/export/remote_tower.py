"""The vision tower as remote code: a model that any transformers since 4.37 opens from a folder of its own.

It is only ever imported from such a folder, next to copies of the modules that it imports (see `code_bundle`), so it
uses nothing but what transformers 4.37 and 5 have in common.

B images, N positions, D semantic_dim.
"""

from dataclasses import fields
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import cached_file

from evotok_plugin.encoder import EvoTokEncoder
from evotok_plugin.image_preparation import to_signed_range
from evotok_plugin.plugins.tower_images import TowerImageProcessor
from evotok_plugin.quantizers.choice import build_quantizer
from evotok_plugin.semantic_decoder import SemanticDecoder
from evotok_plugin.tokenizer_settings import TokenizerSettings

_QUANTIZER = "quantizer."  # prefix of the names of its tensors
_WEIGHTS = "model.safetensors"


class EvoTokTowerConfig(PretrainedConfig):
    """Settings of the tokenizer, with the names that hosts of vision towers read.

    Attributes:
        hidden_size: D, width of the features.
        pixel_range: values of a black and of a white pixel in `pixel_values`.
    """

    model_type = "evotok_tower"

    def __init__(self, pixel_range: Any = (-1.0, 1.0), **kwargs: Any) -> None:
        for field in fields(TokenizerSettings):
            setattr(self, field.name, kwargs.pop(field.name, field.default))
        self.pixel_range = list(pixel_range)
        self.hidden_size, self.num_hidden_layers = self.semantic_dim, 1
        super().__init__(
            **{key: value for key, value in kwargs.items() if key not in ("hidden_size", "num_hidden_layers")}
        )

    def settings(self) -> TokenizerSettings:
        """The settings of the tokenizer, checked."""
        settings = TokenizerSettings(**{field.name: getattr(self, field.name) for field in fields(TokenizerSettings)})
        settings.check()
        return settings


class EvoTokTowerModel(PreTrainedModel):
    """Images to semantic features, in the layout of a CLIP vision model.

    Position 0 takes the place of a class token: it is the mean of the other N, so that hosts that drop the class token
    by default drop no part of the image. There is one layer of features; hosts that ask for the last or for the
    second-to-last hidden state both get it.
    """

    config_class = EvoTokTowerConfig
    main_input_name = "pixel_values"
    base_model_prefix = "vision_tower"
    _supports_sdpa = True
    _keep_in_fp32_modules_strict = ["quantizer"]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        settings = self.settings = config.settings()
        self.encoder = EvoTokEncoder(settings)
        self.quantizer = build_quantizer(settings).fix().eval()
        self.semantic_decoder = SemanticDecoder(settings)
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        """Leave the random values of the constructors; a folder has all weights."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load as transformers does, with codebooks in float32 in any `torch_dtype`: rounded ones give other codes."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        places = {key: kwargs[key] for key in ("cache_dir", "revision", "token", "subfolder") if key in kwargs}
        file = cached_file(pretrained_model_name_or_path, _WEIGHTS, **places)
        with safe_open(file, "pt") as weights:
            for name in (name for name in weights.keys() if name.startswith(_QUANTIZER)):
                own = name[len(_QUANTIZER) :]
                place = getattr(model.quantizer, own).device
                setattr(model.quantizer, own, weights.get_tensor(name).to(place, torch.float32))
        return loaded

    def train(self, mode: bool = True) -> Any:
        """Set the mode of all parts but the quantizer, so that codebooks do not move."""
        super().train(mode)
        self.quantizer.eval()
        return self

    def forward(
        self, pixel_values: Tensor, output_hidden_states: Any = None, return_dict: Any = None, **kwargs: Any
    ) -> Any:
        """Features `last_hidden_state` (B, 1 + N, D) and their mean `pooler_output` (B, D) of images (B, 3, H, W).

        Args:
            output_hidden_states: also return `hidden_states`, which holds `last_hidden_state` twice.
            kwargs: ignored; hosts pass the same arguments to every tower.

        Raises:
            ValueError: height or width is not a multiple of the patch size.
        """
        config = self.config
        decoder = self.semantic_decoder
        grid, dtype = self.settings.grid_of(pixel_values.shape), decoder.class_token.dtype
        pixels = to_signed_range(pixel_values, config.pixel_range).to(decoder.class_token.device, dtype)
        quantized = self.quantizer(self.encoder(pixels), config.semantic_depth)
        features = decoder(quantized.latents_at(config.semantic_depth).to(dtype), grid)
        pooled = features.mean(dim=1)
        features = torch.cat([pooled[:, None], features], dim=1)
        hidden = (features, features) if output_hidden_states else None
        if return_dict is False:
            return tuple(value for value in (features, pooled, hidden) if value is not None)
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=pooled, hidden_states=hidden)


class EvoTokTowerImageProcessor(BaseImageProcessor):
    """The pixels of EvoTok's own image processor; `preprocessor_config.json` also describes a CLIP one.

    The pixels of CLIP's differ by at most one of 255 levels for square images. For others it rounds the size before it
    crops, so that they differ a little more.
    """

    model_input_names = ["pixel_values"]

    def __init__(self, size: Any = None, pixel_range: Any = (-1.0, 1.0), **kwargs: Any) -> None:
        super().__init__(**{key: kwargs[key] for key in kwargs if key == "processor_class"})
        self.pixel_range = list(pixel_range)
        prepare = self._prepare = TowerImageProcessor((size or {"shortest_edge": 256})["shortest_edge"], pixel_range)
        self.size, self.crop_size = prepare.size, prepare.crop_size
        self.image_mean, self.image_std = prepare.image_mean, prepare.image_std

    def preprocess(self, images: Any, return_tensors: Any = "pt", **kwargs: Any) -> Any:
        """Prepare one image, nested lists of images, or the frames of a video (F, H, W, 3): (B, 3, size, size).

        Raises:
            UserError: an input that is not an image, no image at all, or an argument that is not supported.
        """
        pixels = self._prepare.preprocess(images, None, **kwargs)["pixel_values"]
        return BatchFeature({"pixel_values": torch.stack(pixels)}, tensor_type=return_tensors)

    def __call__(self, images: Any, *args: Any, **kwargs: Any) -> Any:
        """As `preprocess`; other versions of transformers check arguments in their own ways."""
        return self.preprocess(images, *args, **kwargs)

    def to_dict(self) -> Any:
        """The settings, in the form of preprocessor_config.json."""
        return {"image_processor_type": type(self).__name__, "size": self.size, "pixel_range": self.pixel_range}
