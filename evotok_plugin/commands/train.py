"""`evotok train`: train a tokenizer from a recipe."""

import argparse
import dataclasses
import logging
import os
from typing import Any

from evotok_plugin.common.allocation import keep_freed_memory
from evotok_plugin.common.recipes import parse_mapping, recipe_values
from evotok_plugin.errors import UserError
from evotok_plugin.training.config import TokenizerTrainingConfig

logger = logging.getLogger(__name__)


def training_values(recipe: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run: those of the recipe, overridden by flags.

    A setting of the recipe that has no effect with the given flags is dropped.

    Raises:
        UserError: the recipe does not exist, or a setting is unknown or has a wrong type.
    """
    values = recipe_values(recipe, TokenizerTrainingConfig, given)
    if given.get("init_from") and given.get("model") is not None:
        values["model"] = parse_mapping(given["model"])  # sizes of the recipe are replaced by those of the folder
    for flag, is_off, names in (
        ("init_from", bool(values.get("init_from")), ("preset", "model")),
        ("val_data", bool(values.get("val_data")), ("val_fraction",)),
        ("semantic_weight", values.get("semantic_weight") == 0, ("teacher",)),
        ("gan_weight", values.get("gan_weight") == 0, ("gan_start", "gan_adaptive")),
    ):
        for name in names:
            if flag in given and is_off and name in values and name not in given:
                dropped = values.pop(name)
                logger.info("--%s %s replaces the recipe's %s %s", flag, values[flag], name, dropped)
    return values


def run(arguments: argparse.Namespace) -> None:
    """Start or resume a run in all processes that torchrun has started.

    Raises:
        UserError: a setting is missing, unknown or wrong, or the run fails on its data or its output.
    """
    from evotok_plugin.training.trainer import TokenizerTrainer

    fields = [field for field in dataclasses.fields(TokenizerTrainingConfig) if field.init]
    given = {field.name: getattr(arguments, field.name) for field in fields if hasattr(arguments, field.name)}
    is_first = os.environ.get("RANK", "0") == "0"
    logging.getLogger("evotok_plugin").setLevel(logging.INFO if is_first else logging.ERROR)
    values = training_values(arguments.recipe, given)
    required = [f.name for f in fields if dataclasses.MISSING is f.default and dataclasses.MISSING is f.default_factory]
    if missing := [repr(name) for name in required if name not in values]:
        raise UserError(f"not set: {' and '.join(missing)}; pass it as a flag or put it into the recipe")
    keep_freed_memory()
    trainer = TokenizerTrainer.open(TokenizerTrainingConfig(**values))
    folder = trainer.run()
    if is_first:
        print(f"tokenizer: {folder}")
    trainer.processes.leave()
