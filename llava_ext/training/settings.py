"""The settings of a stage by name, from a recipe and flags; contradictions and settings without effect are rejected."""

import os
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from evotok_plugin.common.recipes import recipe_values
from evotok_plugin.errors import UserError
from llava_ext.training.config import StageConfig
from llava_ext.training.optimizer_arguments import check_optimizer
from llava_ext.training.supported_arguments import check_supported

QUICKSTART_WORKSPACE = "outputs/quickstart"
DEPTH_HEAD_SETTINGS = ("head_hidden_size", "head_num_layers", "head_num_heads")
# Flags that have no effect unless another setting has one of these values; the error recommends the last one.
_REQUIREMENTS: tuple[tuple[tuple[str, ...], dict[str, tuple[Any, ...]]], ...] = (
    (("lora_r", "lora_alpha", "lora_dropout"), {"lora_enable": (True,)}),
    (("quant_type", "double_quant"), {"bits": (4,)}),
    (("image_head_lr",), {"tune_image_head": (True,)}),
    (("language_model_lr",), {"tune_language_model": (True,), "lora_enable": (True,)}),
    (("group_lengths",), {"group_by_modality_length": (True,)}),
    (("group_lengths", "group_by_modality_length"), {"packing": (False,)}),
    (
        ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
        {"gradient_checkpointing": (True,), "activation_checkpointing": (True,)},
    ),
    (
        ("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph"),
        {"deepspeed": (None, "none")},
    ),
    (("tune_language_model",), {"lora_enable": (False,)}),
    (DEPTH_HEAD_SETTINGS, {"image_head": (None, "depth")}),
)
# Settings that must have any value for flags to have an effect, with an example for the error.
_REQUIRED_VALUES = (
    ("eval_data", "FILE", ("eval_every", "eval_image_folder")),
    (
        "dataloader_num_workers",
        "1",
        ("dataloader_prefetch_factor", "dataloader_persistent_workers", "dataloader_multiprocessing_context"),
    ),
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
    _find_workspace(values, schema, notify)
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
    _replace_settings_of_recipe(values, overrides, notify)
    check_supported(values, schema)
    check_optimizer(values, overrides)
    _check_requirements(values, overrides, schema)
    return values


def _find_workspace(values: dict[str, Any], schema: type[StageConfig], notify: Callable[[str], None]) -> None:
    """Replace `{workspace}` in inputs that exist only in the quickstart's workspace, unless a workspace is given."""
    if "workspace" in values:
        return
    found = []
    for one in fields(schema):
        value = values.get(one.name)
        if one.name in ("output_dir", "code_cache") or not isinstance(value, (str, list)):
            continue
        paths = [value] if isinstance(value, str) else value
        replaced = [_existing_input(path, schema.workspace) if isinstance(path, str) else path for path in paths]
        found += [new for new, old in zip(replaced, paths, strict=True) if new != old]
        values[one.name] = replaced[0] if isinstance(value, str) else replaced
    if found:
        notify(f"inputs of the quickstart are used: {', '.join(found)} (--workspace chooses another folder)")


def _existing_input(path: str, workspace: str) -> str:
    """An input in the quickstart's workspace, if it does not exist in the default one."""
    here, there = (path.replace("{workspace}", folder) for folder in (workspace, QUICKSTART_WORKSPACE))
    return there if here != path and not os.path.exists(here) and os.path.exists(there) else path


def _replace_settings_of_recipe(
    values: dict[str, Any], overrides: dict[str, Any], notify: Callable[[str], None]
) -> None:
    """Remove settings of the recipe that only fit its own data and batches, where flags replace these."""
    if "data_path" in overrides and "data_weights" not in overrides and values.get("data_weights") is not None:
        if len(values["data_weights"]) != len(values["data_path"]):
            notify(f"--data_path replaces the recipe's data_weights {values.pop('data_weights')}")
    grouped = [name for name in ("group_by_modality_length", "group_lengths") if name in overrides and values[name]]
    if grouped and "packing" not in overrides and values.get("packing"):
        notify(f"--{grouped[0]} true replaces the recipe's packing true")
        values["packing"] = False
    if values.get("save_strategy") in ("no", "epoch") and "save_steps" in overrides:
        notify(f"--save_steps {values['save_steps']} has no effect with save_strategy {values['save_strategy']}")


def _check_requirements(values: dict[str, Any], overrides: dict[str, Any], schema: type[StageConfig]) -> None:
    for flags, needed in _REQUIREMENTS:
        if any(values.get(name, getattr(schema, name)) in fitting for name, fitting in needed.items()):
            continue
        for flag in flags:
            if flag in overrides and values[flag] not in (None, False):  # switching it off changes nothing
                remedy = " or ".join(f"--{name} {str(fitting[-1]).lower()}" for name, fitting in needed.items())
                raise UserError(f"--{flag} has no effect without {remedy}")
    for setting, example, dependent in _REQUIRED_VALUES:
        for flag in dependent:
            if not values.get(setting) and flag in overrides and values[flag] not in (None, False):
                raise UserError(f"--{flag} has no effect without --{setting} {example}")
    if values.get("lr_scheduler_type") == "constant":
        for flag in ("warmup_ratio", "warmup_steps", "lr_scheduler_kwargs"):
            if overrides.get(flag) is not None and values[flag]:
                raise UserError(f"--{flag} has no effect with lr_scheduler_type constant; use constant_with_warmup")
