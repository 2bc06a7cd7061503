"""The extended LLaVA: one model that reads and draws images through EvoTok's residual tokens."""

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from llava_ext.configuration_evotok_llava import EvoTokLlavaConfig
from llava_ext.modeling_evotok_llava import EvoTokLlavaForConditionalGeneration, EvoTokLlavaOutput
from llava_ext.processing_evotok_llava import EvoTokLlavaProcessor
from llava_ext.vocabulary import ResidualVocabulary

AutoConfig.register(EvoTokLlavaConfig.model_type, EvoTokLlavaConfig, exist_ok=True)
AutoModelForImageTextToText.register(EvoTokLlavaConfig, EvoTokLlavaForConditionalGeneration, exist_ok=True)
AutoProcessor.register(EvoTokLlavaConfig, EvoTokLlavaProcessor, exist_ok=True)

__all__ = [
    "EvoTokLlavaConfig",
    "EvoTokLlavaForConditionalGeneration",
    "EvoTokLlavaOutput",
    "EvoTokLlavaProcessor",
    "ResidualVocabulary",
]
