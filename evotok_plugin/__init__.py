"""EvoTok, a unified image tokenizer: one residual code sequence for seeing and for drawing."""

from typing import TYPE_CHECKING

from evotok_plugin.common.lazy import lazy_package
from evotok_plugin.common.version import VERSION

if TYPE_CHECKING:
    from evotok_plugin.configuration_evotok import EvoTokConfig
    from evotok_plugin.image_head import DepthTransformerConfig, DepthTransformerHead
    from evotok_plugin.image_processing_evotok import EvoTokImageProcessor
    from evotok_plugin.modeling_evotok import EvoTokEncoderOutput, EvoTokModel, EvoTokOutput
    from evotok_plugin.plugins.llava import EvoTokVisionTower, register_llava
    from evotok_plugin.plugins.vision_tower import EvoTokVisionConfig, EvoTokVisionImageProcessor, EvoTokVisionModel
    from evotok_plugin.quantizer import ResidualVectorQuantizer
    from evotok_plugin.sampling import SamplingOptions, uniform_noise

__version__ = VERSION

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

__getattr__, __dir__ = lazy_package(
    __name__,
    {
        "DepthTransformerConfig": "image_head",
        "DepthTransformerHead": "image_head",
        "EvoTokConfig": "configuration_evotok",
        "EvoTokEncoderOutput": "modeling_evotok",
        "EvoTokImageProcessor": "image_processing_evotok",
        "EvoTokModel": "modeling_evotok",
        "EvoTokOutput": "modeling_evotok",
        "EvoTokVisionConfig": "plugins.vision_tower",
        "EvoTokVisionImageProcessor": "plugins.vision_tower",
        "EvoTokVisionModel": "plugins.vision_tower",
        "EvoTokVisionTower": "plugins.llava",
        "ResidualVectorQuantizer": "quantizer",
        "SamplingOptions": "sampling",
        "register_llava": "plugins.llava",
        "uniform_noise": "sampling",
    },
    registering=["modeling_evotok", "image_processing_evotok", "plugins.vision_tower"],
    light=["plugins.llava", "quantizer"],
)
