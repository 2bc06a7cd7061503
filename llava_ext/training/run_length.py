"""The length and the global batch of a run next to those that its recipe is meant for."""

from pathlib import Path

from evotok_plugin.common.recipes import recipe_values
from llava_ext.training.config import StageConfig


def describe_recipe(recipe: str, config: StageConfig) -> str:
    """Steps or epochs and the batch of a recipe in words, and how to reach its batch with the processes of a run.

    Args:
        recipe: name or YAML file.
        config: a config of the recipe for which `launch.prepare_processes` has been called.
    """
    values = recipe_values(recipe, type(config), {})
    steps, epochs = values.get("max_steps", -1), values.get("num_train_epochs", StageConfig.num_train_epochs)
    length = f"{steps} steps" if steps > 0 else f"{epochs:g} epoch{'' if epochs == 1 else 's'}"
    per_device = values.get("per_device_train_batch_size", StageConfig.per_device_train_batch_size)
    accumulated = values.get("gradient_accumulation_steps", StageConfig.gradient_accumulation_steps)
    batch = f"{per_device * accumulated} samples per step and process ({per_device} x {accumulated} accumulated)"
    wanted = config.reference_batch_size
    if wanted is not None:
        batch = f"{wanted} samples per step over all processes"
    return f"recipe {Path(recipe).stem}: {length}, {batch}{'' if wanted is None else _remedy(wanted, config)}"


def _remedy(wanted: int, config: StageConfig) -> str:
    """A hint if the global batch differs from the wanted one."""
    at_once = config.per_device_train_batch_size * config.world_size
    if at_once * config.gradient_accumulation_steps == wanted:
        return ""
    if wanted % at_once == 0:
        return f"; --gradient_accumulation_steps {wanted // at_once} gives that batch here"
    return "; this run has another batch, so its best learning rate may differ"
