"""EvoTok as a vision model of transformers: configuration, vision tower and image processor.

transformers has no entry points for models, so `import evotok_plugin` must come first. Then
`LlavaForConditionalGeneration`, `LlavaNextForConditionalGeneration` and `LlavaOnevisionForConditionalGeneration` accept
an `EvoTokVisionConfig` as `vision_config`. The tower has a single layer and no class token, so they need
`vision_feature_layer=-1, vision_feature_select_strategy="full"`. The image processors of LLaVA-NeXT and OneVision,
which cut images into tiles, need the tokenizer's `image_size` and 0.5 as mean and standard deviation. ViP-LLaVA is not
supported: it always drops the first position.

B images, N positions, D semantic_dim.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModel, BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import TensorType
from transformers.utils.generic import can_return_tuple

from evotok_plugin.backbone_encoder import build_encoder
from evotok_plugin.common.weight_files import is_model_folder, read_config
from evotok_plugin.configuration_evotok import EvoTokConfig
from evotok_plugin.errors import UserError
from evotok_plugin.image_preparation import check_pixel_range, to_signed_range
from evotok_plugin.image_processing_evotok import EvoTokImageProcessor
from evotok_plugin.modeling_evotok import EvoTokPreTrainedModel
from evotok_plugin.quantizers.choice import build_quantizer
from evotok_plugin.semantic_decoder import SemanticDecoder


class EvoTokVisionConfig(EvoTokConfig):
    """Configuration of a tokenizer under the names that LLaVA expects of a vision tower: `hidden_size` is D.

    Attributes:
        pixel_range: values of a black and of a white pixel in `pixel_values`. Hosts that do not use EvoTok's image
            processor may need (0, 1).
    """

    model_type = "evotok_vision"
    base_config_key = "vision_config"
    attribute_map = {"hidden_size": "semantic_dim"}

    pixel_range: Sequence[float] = (-1.0, 1.0)

    def __post_init__(self, **kwargs: Any) -> None:
        check_pixel_range(self.pixel_range)
        self.pixel_range = list(self.pixel_range)
        super().__post_init__(**kwargs)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read the folder of a tokenizer, of a saved tower, or of a model that contains one.

        Raises:
            UserError: config.json is damaged, or describes another vision tower.
        """
        folder = Path(pretrained_model_name_or_path)
        if is_model_folder(folder):
            read_config(folder)
        values, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        values = values.get(cls.base_config_key, values)
        if values.get("model_type") not in MODEL_TYPES:
            raise UserError(
                f"{str(pretrained_model_name_or_path)!r} holds a {values.get('model_type', 'nameless')} vision tower, "
                f"expected {' or '.join(MODEL_TYPES)}; give the folder of a tokenizer"
            )
        own = {key: value for key, value in values.items() if key != "architectures"}
        return own | {"model_type": cls.model_type}, kwargs


MODEL_TYPES = (EvoTokConfig.model_type, EvoTokVisionConfig.model_type)


class EvoTokVisionModel(EvoTokPreTrainedModel):
    """A tokenizer without its pixel decoder: images in, semantic features out.

    Weight names are those of the tokenizer, so `from_pretrained` accepts a tokenizer folder. Codebooks stay in float32
    and are never updated here, even if the rest of the tower is trained; the encoder then gets the gradient of the
    quantizer.
    """

    config_class = EvoTokVisionConfig
    config: EvoTokVisionConfig
    base_model_prefix = "vision_tower"
    _keys_to_ignore_on_load_unexpected = [r"^pixel_decoder\."]
    # The tower always uses SDPA, regardless of the attention implementation chosen for the model around it.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: EvoTokVisionConfig) -> None:
        config.require_semantics(f"the vision tower {config.name_or_path!r}")
        super().__init__(config)
        self.encoder = build_encoder(config)
        self.quantizer = build_quantizer(config).fix().eval()
        self.semantic_decoder = SemanticDecoder(config)
        self.post_init()

    def train(self, mode: bool = True) -> "EvoTokVisionModel":
        """Set the mode of all parts but the quantizer, which stays in evaluation mode so that codebooks do not move."""
        super().train(mode)
        self.quantizer.eval()
        return self

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | int | list[int] | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Semantic features `last_hidden_state` (B, N, D) of images (B, 3, H, W) in the `pixel_range` of the config.

        Args:
            output_hidden_states: True, or the requested layers; `hidden_states` then holds the only layer, the
                semantic features.
            kwargs: ignored; LLaVA passes the same arguments to every tower.

        Raises:
            UserError: a requested layer does not exist.
            ValueError: height or width is not a multiple of the patch size.
        """
        grid, depth = self.grid_of(pixel_values), self.config.semantic_depth
        hidden_wanted = output_hidden_states is not None and output_hidden_states is not False  # 0 is a layer
        layers = output_hidden_states if isinstance(output_hidden_states, (list, tuple)) else [output_hidden_states]
        if missing := [layer for layer in layers if not isinstance(layer, bool) and layer not in (None, -1, 0)]:
            raise UserError(
                f"vision_feature_layer {missing[0]} does not exist: EvoTok has a single layer, its semantic features, "
                'and no class token; set vision_feature_layer=-1 and vision_feature_select_strategy="full" in the '
                "configuration"
            )
        pixel_values = to_signed_range(pixel_values, self.config.pixel_range)
        quantized = self.quantizer(self.encoder(pixel_values), depth)
        features = self.semantic_decoder(quantized.latents_at(depth).to(self.dtype), grid)
        return BaseModelOutputWithPooling(
            last_hidden_state=features, hidden_states=(features,) if hidden_wanted else None
        )


class EvoTokVisionImageProcessor(BaseImageProcessor):
    """EvoTok's image processor with the attributes that LLaVA reads: sizes as dictionaries, mean, standard deviation.

    `from_pretrained` also accepts a tokenizer folder. Images may be nested lists, as chat templates produce them, or
    the frames of a video as one array (F, H, W, 3), as LLaVA-NeXT passes them.
    """

    model_input_names = ["pixel_values"]

    def __init__(self, size: int | dict[str, int] = 256, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        edge = size["shortest_edge"] if isinstance(size, dict) else size
        self.size, self.crop_size = {"shortest_edge": edge}, {"height": edge, "width": edge}
        self.image_mean, self.image_std = [0.5] * 3, [0.5] * 3

    def preprocess(self, images: Any, return_tensors: str | TensorType | None = "pt", **kwargs: Any) -> BatchFeature:
        """Prepare images, nested lists of images or video frames as `EvoTokImageProcessor.preprocess` does.

        Raises:
            UserError: an input that is not an image, no image at all, or a keyword that is not supported.
        """
        processor = EvoTokImageProcessor(size=self.size["shortest_edge"])
        return processor.preprocess(images, return_tensors=return_tensors, **kwargs)


AutoConfig.register(EvoTokVisionConfig.model_type, EvoTokVisionConfig, exist_ok=True)
AutoModel.register(EvoTokVisionConfig, EvoTokVisionModel, exist_ok=True)
# One class for both backends of transformers, as for EvoTokImageProcessor.
AutoImageProcessor.register(
    EvoTokVisionConfig,
    slow_image_processor_class=EvoTokVisionImageProcessor,
    fast_image_processor_class=EvoTokVisionImageProcessor,
    exist_ok=True,
)
