"""Export the vision tower of an EvoTok folder, so that transformers opens it without this package."""

import json
from pathlib import Path
from string import Template

from safetensors.torch import save_file

from evotok_plugin.common.folders import write_whole_folder
from evotok_plugin.export.code_bundle import bundle
from evotok_plugin.plugins.tower_images import TowerImageProcessor
from evotok_plugin.plugins.tower_network import TowerNetwork, TowerSettings, read_settings

_ENTRY = "evotok_tower"  # the module that `auto_map` names
_REMOTE = "evotok_plugin.export.remote_tower"
_CLASSES = {
    "AutoConfig": "EvoTokTowerConfig",
    "AutoModel": "EvoTokTowerModel",
    "AutoImageProcessor": "EvoTokTowerImageProcessor",
}


def export_tower(folder: str | Path, output: str | Path) -> None:
    """Write encoder, codebooks and semantic decoder, their code, and an image processor into a new folder.

    Args:
        folder: a tokenizer, a tower, or a model that contains one.

    Raises:
        UserError: the folder cannot be read or its semantic decoder was not trained, or the output exists.
    """
    settings = read_settings(folder)
    tower = TowerNetwork(folder, settings)
    weights = {**dict(tower.named_parameters()), **dict(tower.named_buffers())}

    def write(out: Path) -> None:
        files = bundle(_ENTRY, {name: _REMOTE for name in _CLASSES.values()})
        for name, text in files.items():
            (out / name).write_text(text, encoding="utf-8")
        tensors = {name: tensor.detach().contiguous() for name, tensor in weights.items()}
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        _write_json(out / "config.json", _config(settings))
        _write_json(out / "preprocessor_config.json", _preprocessor(settings))
        card = Template((Path(__file__).parent / "tower_card.md").read_text(encoding="utf-8"))
        names = ("image_size", "num_positions", "semantic_dim")
        text = card.substitute({name: getattr(settings, name) for name in names})
        (out / "README.md").write_text(text, encoding="utf-8")

    write_whole_folder(output, write)


def _config(settings: TowerSettings) -> dict:
    auto = {name: f"{_ENTRY}.{_CLASSES[name]}" for name in ("AutoConfig", "AutoModel")}
    own = {"architectures": [_CLASSES["AutoModel"]], "auto_map": auto, "model_type": "evotok_tower"}
    return own | vars(settings) | {"hidden_size": settings.hidden_size, "torch_dtype": "float32"}


def _preprocessor(settings: TowerSettings) -> dict:
    """Settings of our image processor, which is remote code, and of CLIP's for hosts that do not trust such code."""
    ours = TowerImageProcessor(settings.image_size, settings.pixel_range)
    return {
        "auto_map": {"AutoImageProcessor": f"{_ENTRY}.{_CLASSES['AutoImageProcessor']}"},
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": ours.size,
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": ours.crop_size,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": ours.image_mean,
        "image_std": ours.image_std,
        "pixel_range": list(settings.pixel_range),
    }


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
