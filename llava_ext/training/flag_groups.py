"""The flags of a stage in groups, as its `--help` shows them."""

import argparse
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from transformers import TrainingArguments

from evotok_plugin.common.recipes import add_arguments
from llava_ext.training.config import StageConfig
from llava_ext.training.supported_arguments import UNSUPPORTED

GROUPS: dict[str, str] = {
    "model": """
        model_name_or_path vision_tower output_dir workspace overwrite image_head residual_embeddings head_hidden_size
        head_num_layers head_num_heads attn_implementation image_generation
    """,
    "data": """
        data_path data_weights image_folder code_cache caption_task draw_share max_bad_fraction model_max_length
        prompt_dropout packing group_by_modality_length group_lengths dataloader_num_workers
    """,
    "reinforcement": """
        prompts heldout_prompts rewards second_judge prompts_per_step drawings_per_prompt kl_weight replay_weight
        drawing_temperature drawing_batch_size evaluate_every evaluation_prompts sample_every
    """,
    "trained parts": """
        tune_projectors tune_read_projector tune_write_projector tune_image_head tune_language_model text_loss_weight
        image_loss_weight lora_enable lora_r lora_alpha lora_dropout bits quant_type double_quant
    """,
    "optimization": """
        max_steps num_train_epochs per_device_train_batch_size gradient_accumulation_steps reference_batch_size
        learning_rate mm_projector_lr image_head_lr language_model_lr lr_scheduler_type warmup_ratio warmup_steps
        weight_decay max_grad_norm optim seed
    """,
    "hardware": "deepspeed bf16 tf32 use_cpu gradient_checkpointing",
    "logging, evaluation and checkpoints": """
        logging_steps report_to run_name eval_data eval_image_folder eval_every save_steps save_total_limit verify
    """,
}
# Settings of `TrainingArguments` with a meaning of their own in a stage.
_OWN = {
    "max_steps": "number of training steps; -1: num_train_epochs decides",
    "deepspeed": "zero2, zero3, zero3_offload, a DeepSpeed configuration (.json), or none",
    "do_train": "accepted, but not false: a stage always trains",
    "resume_from_checkpoint": "accepted, but not needed: a stage resumes from the newest checkpoint of output_dir",
}
OTHERS = "other settings of transformers' TrainingArguments"


def add_stage_flags(
    parser: argparse.ArgumentParser, schema: type[StageConfig], values: Mapping[str, Any] | None = None
) -> None:
    """Add a flag per setting of a stage, in groups.

    Settings of `TrainingArguments` that have no effect in a stage are parsed, so that they can be rejected with a
    reason, but not shown.

    Args:
        values: the settings of a recipe, which the help shows instead of the defaults.
    """
    texts = _texts(schema)
    settings = [field.name for field in fields(schema)]
    groups = {title: [name for name in names.split() if name in settings] for title, names in GROUPS.items()}
    grouped = {name for names in groups.values() for name in names}
    groups[OTHERS] = [name for name in settings if name not in grouped]
    for title, names in groups.items():
        if names:
            add_arguments(parser.add_argument_group(title), schema, names, values, texts)


def _texts(schema: type[StageConfig]) -> dict[str, str]:
    """The help of settings that differs from that of their field."""
    of_transformers = {field.name: field.metadata.get("help") for field in fields(TrainingArguments)}
    own = {field.name: field.metadata.get("help", "") for field in fields(schema)}
    shortened = {name: _first_sentence(text) for name, text in own.items() if text == of_transformers.get(name)}
    return shortened | _OWN | dict.fromkeys(UNSUPPORTED, argparse.SUPPRESS)


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=[.:])\s+(?=[A-Z0-9`'])", text.strip(), maxsplit=1)[0].rstrip(".")
