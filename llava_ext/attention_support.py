"""The attention implementations that a text backbone supports."""

from transformers import AutoModelForCausalLM, PreTrainedConfig


def supported_attention(config: PreTrainedConfig, wanted: str) -> str:
    """`wanted`, or "eager" if it is PyTorch's SDPA and the backbone has none (Gemma-2 softens its attention scores).

    Args:
        config: of the text backbone.
    """
    classes = AutoModelForCausalLM._model_mapping
    if wanted == "sdpa" and type(config) in classes and not getattr(classes[type(config)], "_supports_sdpa", True):
        return "eager"
    return wanted
