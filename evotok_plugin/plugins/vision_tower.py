"""EvoTok as the vision tower of a LLaVA: in transformers' own classes, and in the LLaVA and LLaVA-NeXT code bases.

transformers knows no entry points for models: what has been imported is there, so `import evotok_plugin` comes first.
After that `LlavaForConditionalGeneration`, `LlavaNextForConditionalGeneration` and
`LlavaOnevisionForConditionalGeneration` take an `EvoTokVisionConfig` as `vision_config`. They must be told that there
is one layer to read and no class token to drop: `vision_feature_layer=-1, vision_feature_select_strategy="full"`.
Pictures that are read in tiles are cut by the image processors of LLaVA-NeXT and OneVision, given the tokenizer's
`image_size` and 0.5 as mean and standard deviation. ViP-LLaVA does not fit: it drops the first position in any case.

B images, N positions, D semantic_dim.
"""

from typing import Any

from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModel, BatchFeature, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import TensorType
from transformers.utils.generic import can_return_tuple

from evotok_plugin.configuration_evotok import EvoTokConfig
from evotok_plugin.encoder import EvoTokEncoder
from evotok_plugin.errors import UserError
from evotok_plugin.image_processing_evotok import EvoTokImageProcessor
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
            UserError: there is no EvoTok in it.
        """
        values, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        values = values.get(cls.base_config_key, values)
        if values.get("model_type") not in _MODEL_TYPES:
            raise UserError(
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
            UserError: height or width is no multiple of the patch size, or there is no such layer.
        """
        grid, depth = self.grid_of(pixel_values), self.config.semantic_depth
        hidden_wanted = output_hidden_states is not None and output_hidden_states is not False  # 0 is a layer
        layers = output_hidden_states if isinstance(output_hidden_states, (list, tuple)) else [output_hidden_states]
        if missing := [layer for layer in layers if not isinstance(layer, bool) and layer not in (None, -1, 0)]:
            raise UserError(
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
            UserError: not an image, none at all, or a keyword that is not supported.
        """
        processor = EvoTokImageProcessor(size=self.size["shortest_edge"])
        return processor.preprocess(images, return_tensors=return_tensors, **kwargs)


# The LLaVA and LLaVA-NeXT code bases ---------------------------------------------------------------------------


AutoConfig.register(EvoTokVisionConfig.model_type, EvoTokVisionConfig, exist_ok=True)
AutoModel.register(EvoTokVisionConfig, EvoTokVisionModel, exist_ok=True)
AutoImageProcessor.register(EvoTokVisionConfig, slow_image_processor_class=EvoTokVisionImageProcessor, exist_ok=True)
