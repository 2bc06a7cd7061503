"""The extended LLaVA: one model that reads and draws images through EvoTok's residual tokens."""

from typing import TYPE_CHECKING

from evotok_plugin.common.lazy import lazy_package

if TYPE_CHECKING:
    from llava_ext.configuration_evotok_llava import EvoTokLlavaConfig
    from llava_ext.model_folder import default_model_folder
    from llava_ext.modeling_base import EvoTokLlavaModel
    from llava_ext.modeling_evotok_llava import EvoTokLlavaForConditionalGeneration, EvoTokLlavaOutput
    from llava_ext.processing_evotok_llava import EvoTokLlavaProcessor
    from llava_ext.vocabulary import ResidualVocabulary

__all__ = [
    "EvoTokLlavaConfig",
    "EvoTokLlavaForConditionalGeneration",
    "EvoTokLlavaModel",
    "EvoTokLlavaOutput",
    "EvoTokLlavaProcessor",
    "ResidualVocabulary",
    "default_model_folder",
]

__getattr__, __dir__ = lazy_package(
    __name__,
    {
        "EvoTokLlavaConfig": "configuration_evotok_llava",
        "EvoTokLlavaForConditionalGeneration": "modeling_evotok_llava",
        "EvoTokLlavaModel": "modeling_base",
        "EvoTokLlavaOutput": "modeling_evotok_llava",
        "EvoTokLlavaProcessor": "processing_evotok_llava",
        "ResidualVocabulary": "vocabulary",
        "default_model_folder": "model_folder",
    },
    registering=["modeling_evotok_llava", "processing_evotok_llava"],
)
