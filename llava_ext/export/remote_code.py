"""The code of model and processor in an exported folder, for transformers without this package."""

from pathlib import Path

from evotok_plugin.common.files import write_json
from evotok_plugin.common.weight_files import read_json
from evotok_plugin.export.code_bundle import bundle

_ENTRY = "evotok_llava"  # the module that `auto_map` names
_MODEL, _PROCESSOR, _IMAGES = "EvoTokLlavaForConditionalGeneration", "EvoTokLlavaProcessor", "EvoTokImageProcessor"
_CLASSES = {
    "EvoTokLlavaConfig": "llava_ext.configuration_evotok_llava",
    _MODEL: "llava_ext.modeling_evotok_llava",
    "EvoTokLlavaModel": "llava_ext.modeling_base",
    _PROCESSOR: "llava_ext.processing_evotok_llava",
    _IMAGES: "evotok_plugin.image_processing_evotok",
}
_OF_CONFIG = {
    "AutoConfig": "EvoTokLlavaConfig",
    "AutoModel": "EvoTokLlavaModel",
    "AutoModelForCausalLM": _MODEL,
    "AutoModelForImageTextToText": _MODEL,
    "AutoModelForMultimodalLM": _MODEL,
    "AutoProcessor": _PROCESSOR,
    "AutoImageProcessor": _IMAGES,
}
_OF_PROCESSOR = {"AutoProcessor": _PROCESSOR, "AutoImageProcessor": _IMAGES}


def write_remote_code(folder: Path) -> None:
    """Add source files and `auto_map` entries to the folder of a model and its processor."""
    for name, text in bundle(_ENTRY, _CLASSES, ("evotok_plugin", "llava_ext")).items():
        (folder / name).write_text(text, encoding="utf-8")
    for name, classes in (("config.json", _OF_CONFIG), ("processor_config.json", _OF_PROCESSOR)):
        content = read_json(folder / name)
        content["auto_map"] = {auto: f"{_ENTRY}.{own}" for auto, own in classes.items()}
        write_json(folder / name, content)
