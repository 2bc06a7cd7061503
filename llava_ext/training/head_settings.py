"""The image head that a stage asks for: that of a new model, or that of the model it continues from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evotok_plugin.errors import UserError
from llava_ext.configuration_evotok_llava import HEAD_SETTINGS, EvoTokLlavaConfig
from llava_ext.training.config import StageConfig


def new_head_settings(config: StageConfig) -> dict[str, Any]:
    """Settings of a stage for the image head of a new model, named as in `EvoTokLlavaConfig`.

    Raises:
        UserError: a setting of the other kind of head.
    """
    given = {name: getattr(config, name) for name in HEAD_SETTINGS}
    if given["residual_embeddings"] is not None and given["image_head"] != "flat":
        raise UserError(
            "residual_embeddings has no effect on a depth transformer; pass --image_head flat, or "
            "--residual_embeddings none"
        )
    return {name: getattr(EvoTokLlavaConfig, name) if value is None else value for name, value in given.items()}


def check_kind_of_head(config: StageConfig, model: EvoTokLlavaConfig) -> None:
    """Check that the model a stage continues from has the kind of image head that the stage asks for.

    Raises:
        UserError: it has another kind.
    """
    for name in ("image_head", "residual_embeddings"):
        asked, has = getattr(config, name), getattr(model, name)
        if asked not in (None, has):
            raise UserError(
                f"{name} is {has!r} in {config.model_name_or_path!r}, but {asked!r} is requested; leave --{name} out, "
                "or start from a causal LM"
            )


def check_given_head_settings(values: Mapping[str, Any], model: EvoTokLlavaConfig, folder: str | Path) -> None:
    """Check that the settings of a new image head, where given, are those of the model a stage continues from.

    Args:
        values: settings by name, as a recipe and flags give them; absent ones are not compared.

    Raises:
        UserError: one differs.
    """
    for name in HEAD_SETTINGS:
        if values.get(name) is not None and values[name] != getattr(model, name):
            raise UserError(
                f"{name} is {getattr(model, name)} in {str(folder)!r}, but {values[name]} is requested; leave "
                f"--{name} out, or start from a causal LM"
            )
