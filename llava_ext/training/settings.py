"""The settings of a stage by name, from a recipe and flags; contradictions and settings without effect are rejected."""

from collections.abc import Callable
from typing import Any

from evotok_plugin.common.recipes import recipe_values
from evotok_plugin.errors import UserError
from llava_ext.training.config import StageConfig
from llava_ext.training.supported_arguments import check_supported

DEPTH_HEAD_SETTINGS = ("head_hidden_size", "head_num_layers", "head_num_heads")
# Flags that have no effect unless another setting has one of these values; the error recommends the last one.
_REQUIREMENTS: tuple[tuple[tuple[str, ...], dict[str, tuple[Any, ...]]], ...] = (
    (("lora_r", "lora_alpha", "lora_dropout"), {"lora_enable": (True,)}),
    (("quant_type", "double_quant"), {"bits": (4,)}),
    (("image_head_lr",), {"tune_image_head": (True,)}),
    (("language_model_lr",), {"tune_language_model": (True,), "lora_enable": (True,)}),
    (("group_lengths",), {"group_by_modality_length": (True,)}),
    (("group_lengths", "group_by_modality_length"), {"packing": (False,)}),
    (("gradient_checkpointing_kwargs",), {"gradient_checkpointing": (True,)}),
    (("tune_language_model",), {"lora_enable": (False,)}),
    (DEPTH_HEAD_SETTINGS, {"image_head": (None, "depth")}),
)


def stage_values(
    recipe: str,
    overrides: dict[str, Any],
    notify: Callable[[str], None] = lambda line: None,
    schema: type[StageConfig] = StageConfig,
) -> dict[str, Any]:
    """The settings of a stage by name: those of the recipe, then the overrides.

    Of two settings that exclude each other, an override takes precedence over the recipe.

    Args:
        notify: called with a line for every setting that is replaced by another.
        schema: the settings that the stage has.

    Raises:
        UserError: the recipe does not exist, or a setting is unknown, has a wrong type or would have no effect.
    """
    values = recipe_values(recipe, schema, overrides)
    for first, second, unset in (("max_steps", "num_train_epochs", -1), ("warmup_steps", "warmup_ratio", 0)):
        if first not in values or second not in values or values[first] == unset or values[second] is None:
            continue
        if second in overrides and first not in overrides:
            notify(f"--{second} {values[second]} replaces the recipe's {first} {values[first]}")
            del values[first]
        elif first in overrides and second not in overrides:
            notify(f"--{first} {values[first]} replaces the recipe's {second} {values[second]}")
            del values[second]
        elif first == "max_steps":
            notify(f"max_steps {values[first]} takes precedence over num_train_epochs {values[second]}")
            del values[second]
        else:
            raise UserError(f"{first} {values[first]} and {second} {values[second]} exclude each other; set one")
    check_supported(values, schema)
    _check_requirements(values, overrides, schema)
    return values


def _check_requirements(values: dict[str, Any], overrides: dict[str, Any], schema: type[StageConfig]) -> None:
    for flags, needed in _REQUIREMENTS:
        if any(values.get(name, getattr(schema, name)) in fitting for name, fitting in needed.items()):
            continue
        for flag in flags:
            if flag in overrides and values[flag] not in (None, False):  # switching it off changes nothing
                remedy = " or ".join(f"--{name} {str(fitting[-1]).lower()}" for name, fitting in needed.items())
                raise UserError(f"--{flag} has no effect without {remedy}")
