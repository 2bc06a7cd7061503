"""`evotok train`: train a tokenizer by a recipe."""

import argparse
import logging
import os

from evotok_plugin.commands.shared import SharedOptions
from evotok_plugin.recipes import add_arguments, load_recipe
from evotok_plugin.training.config import TokenizerTrainingConfig


def add(commands: argparse._SubParsersAction, shared: SharedOptions) -> None:
    parser = commands.add_parser("train", help="train a tokenizer")
    parser.add_argument("--recipe", help="YAML file, or the name of a tokenizer recipe of the project")
    add_arguments(parser, TokenizerTrainingConfig)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from evotok_plugin.training.tokenizer_trainer import TokenizerTrainer

    given = {k: v for k, v in vars(arguments).items() if k not in ("command", "run", "recipe", "flags")}
    first = os.environ.get("RANK", "0") == "0"
    logging.getLogger("evotok_plugin").setLevel(logging.INFO if first else logging.ERROR)
    try:
        config = load_recipe(arguments.recipe, TokenizerTrainingConfig, given, kind="tokenizer")
    except TypeError as error:
        missing = str(error).split("argument")[-1].strip(" s:")
        raise ValueError(f"not set: {missing}; pass it as a flag or put it into the recipe") from None
    trainer = TokenizerTrainer(config)
    folder = trainer.run()
    if first:
        print(f"tokenizer: {folder}")
    trainer.processes.leave()
