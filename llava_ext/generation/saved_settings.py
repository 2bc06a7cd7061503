"""The settings of a model as its files contain them."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from evotok_plugin.common.weight_files import describe_error
from evotok_plugin.errors import UserError
from llava_ext.generation.model_interface import ModelInterface
from llava_ext.generation.options import store_settings


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
