"""Rules for resuming a stage: which settings may change, and whether its data and models are still the same."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

import numpy as np

from evotok_plugin.training.resume import Change, changed_contents, changes, sample_contents
from llava_ext.data.record_table import RecordTable
from llava_ext.data.records import KINDS
from llava_ext.training.config import RESUME, StageConfig
from llava_ext.training.settings import DEPTH_HEAD_SETTINGS
from llava_ext.training.supported_arguments import UNSUPPORTED

# No influence on the weights; may change without a report.
IRRELEVANT = frozenset(
    """
    workspace output_dir overwrite verify code_cache reference_batch_size eval_data eval_image_folder eval_every
    max_bad_fraction report_to run_name disable_tqdm logging_strategy
    logging_steps logging_first_step save_strategy save_steps save_total_limit dataloader_num_workers
    dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context
    torch_empty_cache_steps local_rank do_train resume_from_checkpoint ddp_timeout ddp_backend ddp_bucket_cap_mb
    ddp_broadcast_buffers ddp_find_unused_parameters ddp_static_graph remove_unused_columns
    """.split()
) | frozenset(UNSUPPORTED)
# Take effect from the checkpoint on; changes are reported.
APPLIED = frozenset(
    """
    max_steps num_train_epochs max_grad_norm attn_implementation gradient_checkpointing gradient_checkpointing_kwargs
    activation_checkpointing activation_checkpointing_kwargs tf32 use_cpu deepspeed image_generation
    """.split()
)
# Paths that may change if the content is the same.
BY_CONTENT = frozenset("data_path image_folder model_name_or_path vision_tower".split())
# A change would contradict the optimizer state, the schedule or the order of the data in the checkpoint.
REJECTED = frozenset(
    """
    data_weights caption_task draw_share model_max_length prompt_dropout tune_projectors tune_read_projector
    tune_write_projector tune_image_head tune_language_model image_head residual_embeddings head_hidden_size
    head_num_layers head_num_heads mm_projector_lr image_head_lr language_model_lr lora_enable lora_r lora_alpha
    lora_dropout bits quant_type double_quant group_by_modality_length packing text_loss_weight image_loss_weight
    group_lengths warmup_ratio per_device_train_batch_size learning_rate lr_scheduler_type lr_scheduler_kwargs
    warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon gradient_accumulation_steps bf16 fp16
    full_determinism seed dataloader_drop_last
    """.split()
)

_DIGESTED_RECORDS = 20_000


def settings_with_rule(schema: type[StageConfig], rule: str) -> frozenset[str]:
    """Settings that a stage adds to `StageConfig` with this `RESUME` rule: "irrelevant", "by_content" or "rejected"."""
    return frozenset(field.name for field in fields(schema) if field.metadata.get(RESUME) == rule)


def with_defaults(values: Mapping[str, Any], schema: type[StageConfig] = StageConfig) -> dict[str, Any]:
    """All settings of a stage, those without a value at their defaults; paths compared by content are absolute."""
    complete: dict[str, Any] = {}
    for field in fields(schema):
        if field.init:
            complete[field.name] = field.default if field.default_factory is MISSING else field.default_factory()
    complete |= values
    workspace = complete["workspace"]
    for name in BY_CONTENT | settings_with_rule(schema, "by_content"):
        value = complete[name]
        if isinstance(value, str):
            path = _absolute_path(value, workspace)
            complete[name] = [path] if name == "image_folder" else path  # earlier versions recorded one folder
        elif value is not None:
            complete[name] = [_absolute_path(path, workspace) for path in value]
    return complete


def _absolute_path(path: str, workspace: str) -> str:
    path = path.replace("{workspace}", workspace)
    return path if path.startswith("hf:") else os.path.abspath(path)


def compare(
    before: Mapping[str, Any], now: Mapping[str, Any], schema: type[StageConfig] = StageConfig
) -> tuple[list[Change], list[Change], list[Change]]:
    """Settings that differ from those of the run so far: to be rejected, applied, and decided by content."""
    is_flat = before.get("image_head") == now.get("image_head") == "flat"
    irrelevant = IRRELEVANT | set(DEPTH_HEAD_SETTINGS if is_flat else ())  # earlier versions accepted them there
    irrelevant |= settings_with_rule(schema, "irrelevant")
    content = BY_CONTENT | settings_with_rule(schema, "by_content")
    found = changes(with_defaults(before, schema), with_defaults(now, schema), irrelevant)
    by_content = [change for change in found if change.name in content]
    applied = [change for change in found if change.name in APPLIED]
    rejected = [change for change in found if change.name not in APPLIED | content]
    return rejected, applied, by_content


def content_changes(
    before: Mapping[str, Any], now: Mapping[str, Any], moved: list[Change], is_known: bool = True
) -> list[Change]:
    """Inputs whose content differs from that at the start of the run, whatever their paths are.

    Args:
        before: facts about the run at its start (`train.prepare_training`); a run of an earlier version may have none.
        now: the same facts today.
        moved: inputs whose paths differ.
        is_known: whether `now` has been determined; if not, another path counts as other content.
    """
    model = "sha256" if "sha256" in before else "weights"  # runs of earlier versions recorded a sample of the weights
    different = [
        Change(what, before[key], now.get(key))
        for key, what in (
            ("data", "data"),
            (model, "model_name_or_path"),
            ("tower", "vision_tower"),
            ("prompts", "prompts"),
        )
        if is_known and key in before and before[key] != now.get(key)
    ]
    if not is_known or not before:
        different += moved
    return different or changed_contents(before.get("images"), now.get("images", ()))


def records_fingerprint(records: Any, kinds: np.ndarray, lengths: np.ndarray) -> str:
    """Identity of the data of a run: the number of records, and a digest of their kinds, lengths and contents.

    Of more than 20000 records, the contents of 20000 are digested, evenly spread.
    """
    digest = hashlib.sha256(np.ascontiguousarray(kinds).tobytes() + np.ascontiguousarray(lengths).tobytes())
    count = min(len(records), _DIGESTED_RECORDS)
    for index in np.linspace(0, len(records) - 1, count).round().astype(int).tolist():
        record = records[index]
        digest.update(repr((record.messages, record.images, record.drawn)).encode())
    return f"{len(records)} records, digest {digest.hexdigest()[:16]}"


def image_fingerprints(records: RecordTable) -> list[str]:
    """Identity of the images of a run: `sample_contents` of the records that have images."""
    with_images = np.flatnonzero(records.reads | (records.kinds == KINDS.index("draw")))
    return sample_contents(records.image_content, with_images.tolist())
