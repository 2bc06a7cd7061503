"""From recipe and flags to the settings of a stage, and which of them a resumed run may change."""

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import numpy as np

from evotok_plugin.common.recipes import recipe_values
from evotok_plugin.errors import UserError
from evotok_plugin.training.resume import Change, changed_contents, changes, sample_contents
from llava_ext.configuration_evotok_llava import HEAD_SETTINGS, EvoTokLlavaConfig
from llava_ext.data.record_table import RecordTable
from llava_ext.data.records import KINDS
from llava_ext.training.config import StageConfig
from llava_ext.training.honored import REJECTED as WITHOUT_EFFECT
from llava_ext.training.honored import check_honored

# On resume: without influence on the weights.
IRRELEVANT = frozenset(
    """
    workspace output_dir overwrite code_cache max_bad_fraction report_to run_name disable_tqdm logging_strategy
    logging_steps logging_first_step save_strategy save_steps save_total_limit dataloader_num_workers
    dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context
    torch_empty_cache_steps local_rank do_train resume_from_checkpoint ddp_timeout ddp_backend ddp_bucket_cap_mb
    ddp_broadcast_buffers ddp_find_unused_parameters ddp_static_graph remove_unused_columns
    """.split()
) | frozenset(WITHOUT_EFFECT)
# On resume: take effect from the checkpoint on, and are reported.
APPLIED = frozenset(
    """
    max_steps num_train_epochs max_grad_norm attn_implementation gradient_checkpointing gradient_checkpointing_kwargs
    activation_checkpointing activation_checkpointing_kwargs tf32 use_cpu deepspeed image_generation
    """.split()
)
# On resume: paths that may change as long as what lies there is the same.
BY_CONTENT = frozenset("data_path image_folder model_name_or_path vision_tower".split())
# On resume: the checkpoint's optimizer, schedule or order of data would contradict them.
REJECTED = frozenset(
    """
    data_weights caption_task model_max_length prompt_dropout tune_projectors tune_read_projector
    tune_write_projector tune_image_head tune_language_model image_head residual_embeddings head_hidden_size
    head_num_layers head_num_heads mm_projector_lr image_head_lr language_model_lr lora_enable lora_r lora_alpha
    lora_dropout bits quant_type double_quant group_by_modality_length packing text_loss_weight image_loss_weight
    group_lengths warmup_ratio per_device_train_batch_size learning_rate lr_scheduler_type lr_scheduler_kwargs
    warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon gradient_accumulation_steps bf16 fp16
    full_determinism seed dataloader_drop_last
    """.split()
)

_DIGESTED_RECORDS = 20_000
_OF_DEPTH_HEADS = ("head_hidden_size", "head_num_layers", "head_num_heads")
# Flags that have no effect unless another setting has one of these values; the last is recommended.
_NEED = (
    (("lora_r", "lora_alpha", "lora_dropout"), {"lora_enable": (True,)}),
    (("quant_type", "double_quant"), {"bits": (4,)}),
    (("image_head_lr",), {"tune_image_head": (True,)}),
    (("language_model_lr",), {"tune_language_model": (True,), "lora_enable": (True,)}),
    (("group_lengths",), {"group_by_modality_length": (True,)}),
    (("group_lengths", "group_by_modality_length"), {"packing": (False,)}),
    (("gradient_checkpointing_kwargs",), {"gradient_checkpointing": (True,)}),
    (("tune_language_model",), {"lora_enable": (False,)}),
    (_OF_DEPTH_HEADS, {"image_head": (None, "depth")}),
)


def stage_values(
    recipe: str, overrides: dict[str, Any], say: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """The settings of a stage by name: recipe, then overrides; of settings that exclude each other the override stays.

    Args:
        say: receives a line for every setting that gives way to another.

    Raises:
        UserError: no such recipe, an unknown or wrong setting, or one that would have no effect.
    """
    values = recipe_values(recipe, StageConfig, overrides)
    for first, second, unset in (("max_steps", "num_train_epochs", -1), ("warmup_steps", "warmup_ratio", 0)):
        if first not in values or second not in values or values[first] == unset or values[second] is None:
            continue
        if second in overrides and first not in overrides:
            say(f"--{second} {values[second]} replaces the recipe's {first} {values[first]}")
            del values[first]
        elif first in overrides and second not in overrides:
            say(f"--{first} {values[first]} replaces the recipe's {second} {values[second]}")
            del values[second]
        elif first == "max_steps":
            say(f"max_steps {values[first]} takes precedence over num_train_epochs {values[second]}")
            del values[second]
        else:
            raise UserError(f"{first} {values[first]} and {second} {values[second]} exclude each other; set one")
    check_honored(values, StageConfig)
    for flags, needed in _NEED:
        if any(values.get(name, getattr(StageConfig, name)) in fitting for name, fitting in needed.items()):
            continue
        for flag in flags:
            if flag in overrides and values[flag] not in (None, False):  # off is what it is anyway
                remedy = " or ".join(f"--{name} {str(fitting[-1]).lower()}" for name, fitting in needed.items())
                raise UserError(f"--{flag} has no effect without {remedy}")
    return values


def complete(values: Mapping[str, Any]) -> dict[str, Any]:
    """All settings with their defaults, paths in full."""
    every = {
        field.name: field.default_factory() if field.default is MISSING else field.default
        for field in fields(StageConfig)
        if field.init
    } | dict(values)
    workspace = every["workspace"]
    for name in BY_CONTENT:
        value = every[name]
        if isinstance(value, str):
            every[name] = _full_path(value, workspace)
        elif value is not None:
            every[name] = [_full_path(path, workspace) for path in value]
    return every


def _full_path(path: str, workspace: str) -> str:
    path = path.replace("{workspace}", workspace)
    return path if path.startswith("hf:") else os.path.abspath(path)


def compare(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[list[Change], list[Change], list[Change]]:
    """Settings that differ from those of the run so far: to be rejected, applied, and judged by content."""
    is_flat = before.get("image_head") == now.get("image_head") == "flat"
    irrelevant = IRRELEVANT | set(_OF_DEPTH_HEADS if is_flat else ())  # earlier versions accepted them with a flat head
    found = changes(complete(before), complete(now), irrelevant)
    by_content = [change for change in found if change.name in BY_CONTENT]
    applied = [change for change in found if change.name in APPLIED]
    rejected = [change for change in found if change.name not in APPLIED | BY_CONTENT]
    return rejected, applied, by_content


def content_changes(
    before: Mapping[str, Any], now: Mapping[str, Any], moved: list[Change], at_hand: bool = True
) -> list[Change]:
    """Inputs whose content differs from what the run was started with, whatever their paths are.

    Args:
        before, now: facts of the run, `inputs_of`; before, an older run may have none.
        moved: inputs whose paths differ.
        at_hand: whether `now` is known; without it other paths count as other content.
    """
    model = "sha256" if "sha256" in before else "weights"  # runs of earlier versions know only a sample of the weights
    different = [
        Change(what, before[key], now.get(key))
        for key, what in (("data", "data"), (model, "model_name_or_path"), ("tower", "vision_tower"))
        if at_hand and key in before and before[key] != now.get(key)
    ]
    if not at_hand or not before:
        different += moved
    return different or changed_contents(before.get("images"), now.get("images", ()))


def inputs_of(records: Any, kinds: np.ndarray, lengths: np.ndarray) -> str:
    """Identity of a run's data: number of records, and a digest of their kinds, lengths and contents (of
    20000, evenly spread, where there are more)."""
    digest = hashlib.sha256(np.ascontiguousarray(kinds).tobytes() + np.ascontiguousarray(lengths).tobytes())
    count = min(len(records), _DIGESTED_RECORDS)
    for index in np.linspace(0, len(records) - 1, count).round().astype(int).tolist():
        record = records[index]
        digest.update(repr((record.messages, record.images, record.drawn)).encode())
    return f"{len(records)} records, digest {digest.hexdigest()[:16]}"


def contents_of(records: RecordTable) -> list[str]:
    """Identity of a run's images by content: `sample_contents` of records that have some."""
    with_images = np.flatnonzero(records.reads | (records.kinds == KINDS.index("draw")))
    return sample_contents(records.image_content, with_images)


def check_new_parts(values: Mapping[str, Any], model: EvoTokLlavaConfig, folder: str | Path) -> None:
    """Refuse settings of a new image head that a model which has one already contradicts.

    Raises:
        UserError: there is one.
    """
    for name in HEAD_SETTINGS:
        if values.get(name) is not None and values[name] != getattr(model, name):
            raise UserError(
                f"{name} is {getattr(model, name)} in {str(folder)!r}, but {values[name]} is asked for; leave "
                f"--{name} out, or start from a causal LM"
            )
