"""The settings of a model as its files contain them."""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from evotok_plugin.common.files import write_text
from evotok_plugin.common.foreign_files import describe_error
from evotok_plugin.common.weight_files import read_json
from evotok_plugin.errors import UserError
from evotok_plugin.model_folder import GENERATION_CONFIG
from llava_ext.generation.model_interface import ModelInterface
from llava_ext.generation.options import IMAGE_GENERATION, DrawingOptions, store_settings, to_entry
from llava_ext.generation.selection_options import IMAGE_SELECTION, SelectionOptions


def restore_settings(model: ModelInterface, file: Path) -> None:
    """Give a loaded model the drawing and selection settings in its generation_config.json, and check them.

    Raises:
        UserError: the settings are invalid; it names the file.
    """
    if model.generation_config._from_model_config and file.is_file():
        # With `_from_model_config` in the file, transformers drops the entries that it does not know.
        values = read_json(file)
        for name in (IMAGE_GENERATION, IMAGE_SELECTION):
            if values.get(name) is not None:
                setattr(model.generation_config, name, values[name])
    try:
        DrawingOptions().for_model(model)
        SelectionOptions().for_model(model)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


@contextmanager
def settings_to_save(model: ModelInterface) -> Iterator[None]:
    """Give a model the settings that its files contain, for the time of a block that writes them.

    Its generation config has complete drawing settings, and its configuration enables the key-value cache, which
    Trainer disables during training. Afterwards, also after an error, the model has its own settings again.

    Raises:
        UserError: transformers refuses to save the generation settings.
    """
    generation_config = model.generation_config
    without_cache = [c for c in (model.config, model.config.text_config) if getattr(c, "use_cache", None) is False]
    try:
        model.generation_config = copy.deepcopy(generation_config)
        store_settings(model.generation_config)
        for config in without_cache:
            config.use_cache = True
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(
            f"the generation settings of the model cannot be saved: {describe_error(error)}; correct them in the "
            "generation_config.json of the model that it started from"
        ) from error
    finally:
        model.generation_config = generation_config
        for config in without_cache:
            config.use_cache = False


def write_settings(folder: str | Path, options: DrawingOptions) -> None:
    """Replace the drawing settings in the generation_config.json of a model folder atomically; the rest is unchanged.

    Args:
        options: complete.

    Raises:
        UserError: the file is damaged or cannot be written.
    """
    path = Path(folder) / GENERATION_CONFIG
    values = read_json(path) if path.exists() else {}
    values[IMAGE_GENERATION] = to_entry(options)
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
