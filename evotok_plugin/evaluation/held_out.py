"""The images that a tokenizer training run held out, from the settings in its folder."""

from pathlib import Path

from evotok_plugin.data.sources import Concatenated, ImageSource, open_source, open_sources, split_held_out
from evotok_plugin.errors import UserError
from evotok_plugin.training.config import TokenizerTrainingConfig
from evotok_plugin.training.resume import RECIPE, read_recipe


def held_out_images(run: Path) -> ImageSource:
    """Open the images that a run did not train on: its `val_data`, or the part that a hash of names selects.

    Relative paths in the run's settings begin at the working folder, as they did when it was started.

    Raises:
        UserError: not the folder of a tokenizer run, its images are gone, or it held out none.
    """
    recipe = read_recipe(run)
    if recipe is None or not isinstance(recipe.get("data"), list):
        raise UserError(
            f"--held_out {run}: expected the output folder of `evotok train`, with a {RECIPE} that lists its data"
        )
    try:
        if recipe.get("val_data"):
            return open_sources(recipe["val_data"])
        fraction = recipe.get("val_fraction", TokenizerTrainingConfig.val_fraction)
        held = Concatenated([split_held_out(open_source(spec), fraction)[1] for spec in recipe["data"]])
    except UserError as error:
        raise UserError(
            f"--held_out {run}: {error}; run the command in the folder in which the run was started, with its images"
        ) from error
    if not len(held):
        raise UserError(
            f"--held_out {run}: the run held out no images (val_fraction {fraction:g} of {held.name}); name the images "
            "to evaluate on instead"
        )
    return held
