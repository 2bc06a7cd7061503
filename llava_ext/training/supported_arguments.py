"""The fields of transformers' `TrainingArguments` that have an effect in a stage; all others are rejected.

Every field is in one of the two tables, and a test compares them with `TrainingArguments`, so that a new version of
transformers cannot add a setting without effect.
"""

from dataclasses import MISSING, Field, fields
from typing import Any

from transformers import TrainingArguments

from evotok_plugin.errors import UserError

SUPPORTED = frozenset(
    """
    output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type
    lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon
    gradient_accumulation_steps max_grad_norm bf16 fp16 tf32 activation_checkpointing activation_checkpointing_kwargs
    gradient_checkpointing gradient_checkpointing_kwargs torch_empty_cache_steps logging_strategy logging_steps
    logging_first_step disable_tqdm report_to run_name save_strategy save_steps save_total_limit full_determinism seed
    use_cpu dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
    dataloader_prefetch_factor dataloader_multiprocessing_context remove_unused_columns ddp_find_unused_parameters
    ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout deepspeed do_train
    resume_from_checkpoint local_rank
    """.split()
)

_NO_EVALUATION = (
    "--eval_data FILES and --eval_every STEPS evaluate held-out samples; scripts/evaluate.sh runs benchmarks"
)
_NO_HUB = "a stage does not upload; upload the model folder with `hf upload`"
_NO_BEST = "a stage saves the model of the last step"
_NO_COMPILE = "the batches of a stage have many shapes, so compiled training is not supported"
_NO_FSDP = "a stage is distributed by DeepSpeed; pass --deepspeed zero3"
_NO_TRACKIO = "set the environment variables of trackio"

UNSUPPORTED: dict[str, str] = {
    "optim_target_modules": "the optimizers that use it would ignore the learning rates of the parameter groups",
    "average_tokens_across_devices": "losses are always means over the tokens of all processes",
    "label_smoothing_factor": "the model computes its own losses, without label smoothing",
    "bf16_full_eval": _NO_EVALUATION,
    "fp16_full_eval": _NO_EVALUATION,
    "torch_compile": _NO_COMPILE,
    "torch_compile_backend": _NO_COMPILE,
    "torch_compile_mode": _NO_COMPILE,
    "use_liger_kernel": "Liger has no kernels for this model",
    "liger_kernel_config": "Liger has no kernels for this model",
    "use_cache": "training never uses a key-value cache",
    "neftune_noise_alpha": "it would also add noise to the embeddings of images",
    "auto_find_batch_size": "a checkpoint can only be resumed with the batch size that it was written with; "
    "`evotok-llava estimate` shows what fits",
    "log_on_each_node": "only the first process logs",
    "logging_nan_inf_filter": "a loss that is NaN or infinite stops the run",
    "include_num_input_tokens_seen": "a stage does not log token counts",
    "log_level": "the training command sets the level of its messages",
    "log_level_replica": "the training command sets the level of its messages",
    "project": "set the environment variable of the reporter, such as WANDB_PROJECT",
    "trackio_space_id": _NO_TRACKIO,
    "trackio_bucket_id": _NO_TRACKIO,
    "trackio_static_space_id": _NO_TRACKIO,
    "eval_strategy": _NO_EVALUATION,
    "eval_steps": _NO_EVALUATION,
    "eval_delay": _NO_EVALUATION,
    "per_device_eval_batch_size": _NO_EVALUATION,
    "prediction_loss_only": _NO_EVALUATION,
    "eval_on_start": _NO_EVALUATION,
    "eval_do_concat_batches": _NO_EVALUATION,
    "eval_use_gather_object": _NO_EVALUATION,
    "eval_accumulation_steps": _NO_EVALUATION,
    "include_for_metrics": _NO_EVALUATION,
    "batch_eval_metrics": _NO_EVALUATION,
    "save_only_model": "a checkpoint without optimizer state could not be resumed",
    "save_on_each_node": "checkpoints are written once, to a folder that all nodes share",
    "enable_jit_checkpoint": "SIGTERM and Ctrl-C already save the step and end the run",
    "push_to_hub": _NO_HUB,
    "hub_token": _NO_HUB,
    "hub_private_repo": _NO_HUB,
    "hub_model_id": _NO_HUB,
    "hub_strategy": _NO_HUB,
    "hub_always_push": _NO_HUB,
    "hub_revision": _NO_HUB,
    "load_best_model_at_end": _NO_BEST,
    "metric_for_best_model": _NO_BEST,
    "greater_is_better": _NO_BEST,
    "ignore_data_skip": "a resumed run always continues at the sample where it stopped",
    "restore_callback_states_from_checkpoint": "the callbacks of a stage have no state",
    "data_seed": "--seed also determines the order of the data",
    "accelerator_config": "the samplers of a stage divide the data among the processes",
    "parallelism_config": "a stage is distributed by DeepSpeed",
    "dataloader_in_order": "a resumed run needs the samples in order",
    "label_names": "the collator of a stage creates the labels",
    "train_sampling_strategy": "use --group_by_modality_length and --group_lengths",
    "length_column_name": "lengths are measured on the samples; use --group_lengths",
    "fsdp": _NO_FSDP,
    "fsdp_config": _NO_FSDP,
    "debug": "a loss that is NaN or infinite always stops the run",
    "skip_memory_metrics": "a stage does not log memory",
    "do_eval": _NO_EVALUATION,
    "do_predict": _NO_EVALUATION,
}


def check_supported(values: dict[str, Any], defaults: type[TrainingArguments]) -> None:
    """Check that every setting has an effect.

    Args:
        values: settings by name, as a recipe or flags give them.
        defaults: the schema of the settings; an unsupported setting may be given with its default.

    Raises:
        UserError: a setting, or a value of it, that has no effect.
    """
    known = {field.name: field for field in fields(defaults)}
    for name, value in values.items():
        if name in UNSUPPORTED and not _is_default(value, known[name]):
            raise UserError(f"{name}={value} has no effect in a stage: {UNSUPPORTED[name]}; leave it out")
    if str(values.get("save_strategy", "steps")).split(".")[-1].lower() == "best":
        raise UserError(f"save_strategy=best has no effect in a stage: {_NO_BEST}; use steps, epoch or no")
    if values.get("do_train") is False:
        raise UserError("do_train=false has no effect in a stage: it always trains; leave it out")
    if values.get("remove_unused_columns"):
        raise UserError("remove_unused_columns=true would remove fields that the collator needs; leave it out")


def _is_default(value: Any, field: Field[Any]) -> bool:
    default = field.default if field.default_factory is MISSING else field.default_factory()
    same = (default, getattr(default, "value", default), None if default in ("", []) else default)
    return value in same or (isinstance(value, str) and value.lower() == str(same[1]).lower())
