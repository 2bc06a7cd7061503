"""Loading of tokenizer folders: the model and its image processor."""

import logging
from pathlib import Path
from typing import Any

from evotok_plugin.common.processes import resolve_device
from evotok_plugin.common.weight_files import is_model_folder, read_config
from evotok_plugin.configuration_evotok import EvoTokConfig
from evotok_plugin.errors import UserError
from evotok_plugin.image_processing_evotok import EvoTokImageProcessor
from evotok_plugin.model_folder import load_whole, model_type_of, open_processor
from evotok_plugin.modeling_evotok import EvoTokModel
from evotok_plugin.tokenizer_settings import recorded_semantics

logger = logging.getLogger(__name__)


def load_tokenizer(folder: str | Path, **options: Any) -> EvoTokModel:
    """Load the tokenizer of a folder.

    Args:
        options: passed to `from_pretrained`.

    Raises:
        UserError: the folder does not exist, holds another kind of model, or its weights are missing, damaged or do
            not fit.
    """
    kind = model_type_of(folder)
    if kind != EvoTokConfig.model_type:
        raise UserError(f"{str(folder)!r} holds a {kind or 'nameless'} model, expected {EvoTokConfig.model_type}")
    if recorded_semantics(folder, read_config(folder)) is None:
        logger.warning(
            "%s does not record whether its semantic decoder was trained; it counts as trained. If it was trained "
            'without a teacher, add "semantic_decoder_trained": false to its config.json',
            folder,
        )
    return load_whole(EvoTokModel, folder, **options)


def open_image_processor(folder: str | Path) -> EvoTokImageProcessor:
    """Open the image processor of a tokenizer folder.

    Raises:
        UserError: its file is missing or damaged.
    """
    return open_processor(
        EvoTokImageProcessor,
        folder,
        "the image processor",
        [("preprocessor_config.json", "processor_config.json")],
        "copy it from the folder in which the tokenizer was trained, or create it with "
        "EvoTokImageProcessor(size=PIXELS).save_pretrained(folder)",
    )


DEFAULT_MODELS = ("outputs/evotok", "outputs/quickstart/evotok")


def open_tokenizer(folder: str | None, device: str = "auto") -> tuple[EvoTokModel, EvoTokImageProcessor]:
    """Load the tokenizer and the image processor of a folder; weights must match exactly.

    Args:
        folder: by default the first of `DEFAULT_MODELS` that exists.

    Raises:
        UserError: the folder does not exist, does not hold an EvoTok model, or weights are missing, unexpected or of
            another shape.
    """
    resolved = resolve_device(device)
    if folder is None:
        found = [path for path in DEFAULT_MODELS if is_model_folder(path)]
        if not found:
            raise UserError(f"found no tokenizer in {' or '.join(DEFAULT_MODELS)}; name one with --model FOLDER")
        folder = found[0]
    model, processor = load_tokenizer(folder), open_image_processor(folder)
    model.to(resolved)  # type: ignore[arg-type]  # transformers' decorator hides the signature of `to`
    return model.eval(), processor
