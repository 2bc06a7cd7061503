"""Which of transformers' `TrainingArguments` a stage honors; any other that differs from its default is an error.

Every field is in one of the two tables, so that a new version of transformers cannot add a setting without effect.
"""

from dataclasses import MISSING, fields
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

_NO_EVALUATION = "a stage does not evaluate; run scripts/evaluate.sh on the model"
_NO_HUB = "a stage does not upload; upload the model folder with `hf upload`"
_NO_BEST = "a stage does not evaluate, so the model is that of the last step"
_NO_COMPILE = "the batches of a stage have many shapes, compiled training is not supported"
_NO_FSDP = "a stage is spread over GPUs by DeepSpeed; pass --deepspeed zero3"
_NO_TRACKIO = "set trackio's own environment variables"

UNSUPPORTED: dict[str, str] = {
    "optim_target_modules": "the optimizers that need it would not see the parts' learning rates",
    "average_tokens_across_devices": "losses are means over the tokens of all processes",
    "label_smoothing_factor": "the model computes its own losses, without label smoothing",
    "bf16_full_eval": _NO_EVALUATION,
    "fp16_full_eval": _NO_EVALUATION,
    "torch_compile": _NO_COMPILE,
    "torch_compile_backend": _NO_COMPILE,
    "torch_compile_mode": _NO_COMPILE,
    "use_liger_kernel": "Liger's kernels do not know this model",
    "liger_kernel_config": "Liger's kernels do not know this model",
    "use_cache": "training never uses a key-value cache",
    "neftune_noise_alpha": "noise would also be added to the embeddings of images; it is not supported",
    "auto_find_batch_size": "a checkpoint can only be resumed with the batch size it was written with; "
    "`evotok-llava estimate` says what fits",
    "log_on_each_node": "the first process alone logs",
    "logging_nan_inf_filter": "a loss that is NaN or infinite stops the run",
    "include_num_input_tokens_seen": "token counts are not logged",
    "log_level": "messages are set up by the training command",
    "log_level_replica": "messages are set up by the training command",
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
    "ignore_data_skip": "a resumed run continues at the sample where it was stopped",
    "restore_callback_states_from_checkpoint": "the stage's callbacks have no state of their own",
    "data_seed": "--seed sets the order of the data, too",
    "accelerator_config": "the stage's samplers divide the data among the processes themselves",
    "parallelism_config": "a stage is spread over GPUs by DeepSpeed",
    "dataloader_in_order": "a resumed run needs the samples in order",
    "label_names": "labels are made by the stage's collator",
    "train_sampling_strategy": "use --group_by_modality_length and --group_lengths",
    "length_column_name": "lengths are measured on the samples; use --group_lengths",
    "fsdp": _NO_FSDP,
    "fsdp_config": _NO_FSDP,
    "debug": "a loss that is NaN or infinite stops the run without it",
    "skip_memory_metrics": "memory is not logged",
    "do_eval": _NO_EVALUATION,
    "do_predict": _NO_EVALUATION,
}


def check_supported(values: dict[str, Any], defaults: type[TrainingArguments]) -> None:
    """Refuse settings that would have no effect.

    Args:
        values: settings by name, as a recipe or flags give them.
        defaults: the schema whose defaults may be given, too.

    Raises:
        UserError: one that is not honored and differs from its default, or a value that is not honored.
    """
    known = {field.name: field for field in fields(defaults)}
    for name, value in values.items():
        if name in UNSUPPORTED and not _is_default(value, known[name]):
            raise UserError(f"{name}={value} has no effect in a stage: {UNSUPPORTED[name]}; leave it out")
    if str(values.get("save_strategy", "steps")).split(".")[-1].lower() == "best":
        raise UserError(f"save_strategy=best has no effect in a stage: {_NO_BEST}; use steps, epoch or no")
    if values.get("remove_unused_columns"):
        raise UserError("remove_unused_columns=true would remove what the collator needs; leave it out")


def _is_default(value: Any, field: Any) -> bool:
    default = field.default_factory() if field.default is MISSING else field.default
    same = (default, getattr(default, "value", default), None if default in ("", []) else default)
    return value in same or (isinstance(value, str) and value.lower() == str(same[1]).lower())
