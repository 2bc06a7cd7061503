"""`evotok train`: train a tokenizer by a recipe."""

import argparse
import logging
import os
from typing import Any

from evotok_plugin.commands.options import SharedOptions
from evotok_plugin.common.recipes import add_arguments, recipe_values
from evotok_plugin.errors import UserError
from evotok_plugin.training.config import TokenizerTrainingConfig

logger = logging.getLogger(__name__)


def add(commands: argparse._SubParsersAction, shared: SharedOptions) -> None:
    parser = commands.add_parser("train", help="train a tokenizer")
    parser.add_argument("--recipe", help="YAML file, or the name of a tokenizer recipe of the project")
    add_arguments(parser, TokenizerTrainingConfig)
    parser.set_defaults(run=run)


def training_values(recipe: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run: recipe, then flags; of a recipe's settings that a flag leaves without effect, none.

    Raises:
        UserError: no such recipe, or an unknown or wrong setting.
    """
    values = recipe_values(recipe, TokenizerTrainingConfig, given)
    for flag, is_off, names in (
        ("val_data", bool(values.get("val_data")), ("val_fraction",)),
        ("semantic_weight", values.get("semantic_weight") == 0, ("teacher",)),
        ("gan_weight", values.get("gan_weight") == 0, ("gan_start", "gan_adaptive")),
    ):
        for name in names:
            if flag in given and is_off and name in values and name not in given:
                logger.info("--%s %s replaces the recipe's %s %s", flag, values[flag], name, values.pop(name))
    return values


def run(arguments: argparse.Namespace) -> None:
    from evotok_plugin.training.trainer import TokenizerTrainer

    given = {k: v for k, v in vars(arguments).items() if k not in ("command", "run", "recipe", "flags")}
    first = os.environ.get("RANK", "0") == "0"
    logging.getLogger("evotok_plugin").setLevel(logging.INFO if first else logging.ERROR)
    try:
        config = TokenizerTrainingConfig(**training_values(arguments.recipe, given))
    except TypeError as error:
        missing = str(error).split("argument")[-1].strip(" s:")
        raise UserError(f"not set: {missing}; pass it as a flag or put it into the recipe") from None
    trainer = TokenizerTrainer(config)
    folder = trainer.run()
    if first:
        print(f"tokenizer: {folder}")
    trainer.processes.leave()
