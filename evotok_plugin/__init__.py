"""EvoTok, a unified image tokenizer: one residual code sequence for seeing and for drawing."""

from transformers import AutoConfig, AutoImageProcessor, AutoModel

from evotok_plugin.configuration_evotok import EvoTokConfig
from evotok_plugin.image_head import DepthTransformerConfig, DepthTransformerHead
from evotok_plugin.image_processing_evotok import EvoTokImageProcessor
from evotok_plugin.modeling_evotok import EvoTokEncoderOutput, EvoTokModel, EvoTokOutput
from evotok_plugin.plugins.llava import EvoTokVisionTower, register_llava
from evotok_plugin.plugins.vision_tower import EvoTokVisionConfig, EvoTokVisionImageProcessor, EvoTokVisionModel
from evotok_plugin.quantizer import ResidualVectorQuantizer
from evotok_plugin.sampling import SamplingOptions, uniform_noise

AutoConfig.register(EvoTokConfig.model_type, EvoTokConfig, exist_ok=True)
AutoModel.register(EvoTokConfig, EvoTokModel, exist_ok=True)
AutoImageProcessor.register(EvoTokConfig, slow_image_processor_class=EvoTokImageProcessor, exist_ok=True)
AutoConfig.register(EvoTokVisionConfig.model_type, EvoTokVisionConfig, exist_ok=True)
AutoModel.register(EvoTokVisionConfig, EvoTokVisionModel, exist_ok=True)
AutoImageProcessor.register(EvoTokVisionConfig, slow_image_processor_class=EvoTokVisionImageProcessor, exist_ok=True)

__all__ = [
    "DepthTransformerConfig",
    "DepthTransformerHead",
    "EvoTokConfig",
    "EvoTokEncoderOutput",
    "EvoTokImageProcessor",
    "EvoTokModel",
    "EvoTokOutput",
    "EvoTokVisionConfig",
    "EvoTokVisionImageProcessor",
    "EvoTokVisionModel",
    "EvoTokVisionTower",
    "ResidualVectorQuantizer",
    "SamplingOptions",
    "register_llava",
    "uniform_noise",
]
