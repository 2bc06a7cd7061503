"""EvoTok, a unified image tokenizer: one residual code sequence for seeing and for drawing."""

from transformers import AutoConfig, AutoImageProcessor, AutoModel

from evotok_plugin.configuration_evotok import EvoTokConfig
from evotok_plugin.image_processing_evotok import EvoTokImageProcessor
from evotok_plugin.modeling_evotok import EvoTokEncoderOutput, EvoTokModel, EvoTokOutput
from evotok_plugin.quantizer import ResidualVectorQuantizer

AutoConfig.register(EvoTokConfig.model_type, EvoTokConfig, exist_ok=True)
AutoModel.register(EvoTokConfig, EvoTokModel, exist_ok=True)
AutoImageProcessor.register(EvoTokConfig, slow_image_processor_class=EvoTokImageProcessor, exist_ok=True)

__all__ = [
    "EvoTokConfig",
    "EvoTokEncoderOutput",
    "EvoTokImageProcessor",
    "EvoTokModel",
    "EvoTokOutput",
    "ResidualVectorQuantizer",
]
