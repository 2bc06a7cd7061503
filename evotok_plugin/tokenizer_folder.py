"""Tokenizer folders: the model and the image processor of one."""

from pathlib import Path
from typing import Any

from evotok_plugin.common.processes import resolve_device
from evotok_plugin.configuration_evotok import EvoTokConfig
from evotok_plugin.errors import UserError
from evotok_plugin.image_processing_evotok import EvoTokImageProcessor
from evotok_plugin.model_folder import load_whole, model_type_of, open_processor
from evotok_plugin.modeling_evotok import EvoTokModel


def load_tokenizer(folder: str | Path, **options: Any) -> EvoTokModel:
    """The tokenizer of a folder.

    Args:
        options: of `from_pretrained`.

    Raises:
        UserError: no such folder, another kind of model, or weights that are missing, damaged or do not fit.
    """
    kind = model_type_of(folder)
    if kind != EvoTokConfig.model_type:
        raise UserError(f"{str(folder)!r} holds a {kind or 'nameless'} model, expected {EvoTokConfig.model_type}")
    return load_whole(EvoTokModel, folder, **options)


def open_image_processor(folder: str | Path) -> EvoTokImageProcessor:
    """The image processor of a tokenizer folder.

    Raises:
        UserError: its file is missing or damaged.
    """
    return open_processor(
        EvoTokImageProcessor,
        folder,
        "the image processor",
        [("preprocessor_config.json", "processor_config.json")],
        "copy it from the folder that the tokenizer was trained in, or write it with "
        "EvoTokImageProcessor(size=PIXELS).save_pretrained",
    )


DEFAULT_MODELS = ("outputs/evotok", "outputs/quickstart/evotok")


def open_tokenizer(folder: str | None, device: str = "auto") -> tuple[EvoTokModel, EvoTokImageProcessor]:
    """Load a tokenizer folder, strictly.

    Raises:
        UserError: no such folder, not an EvoTok model, or weights that are missing, left over or of another shape.
    """
    place = resolve_device(device)
    if folder is None:
        found = [path for path in DEFAULT_MODELS if (Path(path) / "config.json").is_file()]
        if not found:
            raise UserError(f"no tokenizer in {' or '.join(DEFAULT_MODELS)}; name one with --model FOLDER")
        folder = found[0]
    model, processor = load_tokenizer(folder), open_image_processor(folder)
    return model.to(place).eval(), processor
