"""Flags of the training scripts of LLaVA and LLaVA-NeXT, and of older versions of transformers.

A flag is a flag of a stage with the same meaning (`SAME`), translated to another one, accepted without effect (with a
notice), or rejected with a replacement. `docs/llava_flags.md` shows the tables (`flag_tables`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from evotok_plugin.errors import UserError

_TRUE, _FALSE = ("true", "yes", "1", ""), ("false", "no", "0", "none")


@dataclass(frozen=True)
class LlavaFlag:
    """Translation of a flag.

    Attributes:
        accepted: the accepted values, in lower case; None for any.
        note: the notice for an accepted value: its translation, or why it has no effect.
        instead: the replacement for a value that is not accepted.
        flags: the flags that an accepted value is translated to; `{}` is replaced by the value.
    """

    accepted: tuple[str, ...] | None
    note: str
    instead: str = ""
    flags: tuple[str, ...] = ()


SAME: dict[str, str] = {
    "model_name_or_path": "a causal LM (stage 1: a folder, a hub id or a GGUF file) or an EvoTok-LLaVA folder",
    "vision_tower": "an EvoTok tokenizer folder instead of CLIP; needed only in stage 1",
    "data_path": "also several files, patterns, .jsonl, .parquet, .tar and hf:NAME (docs/data.md)",
    "image_folder": "one for all entries of `data_path`, or one for each",
    "model_max_length": "LLM steps of a sample; an image takes one per position",
    "group_by_modality_length": "batches of one kind of sample and of similar lengths; not with packing",
    "mm_projector_lr": "learning rate of both projectors and of the new tokens",
    "lora_enable": "projectors, image head and new tokens train in full",
    "lora_r": "",
    "lora_alpha": "",
    "lora_dropout": "",
    "bits": "16, or 4 (QLoRA); 8 is not supported",
    "quant_type": "",
    "double_quant": "",
    "attn_implementation": "by default flash_attention_2 if it is available, else sdpa, else eager",
    "remove_unused_columns": "only false",
    "gradient_checkpointing": "",
}

_TEMPLATE = "the model folder's chat template is used"
_DELIMITERS = "every image has start and end tokens"
_NO_EVAL = "--eval_data FILES and --eval_every STEPS evaluate held-out samples"
_NO_RESAMPLER = "the model has no resampler"
_NO_VIDEO = "leave it out: videos are not supported"
_ONE_SIZE = "leave it out: an image is read at one size"
_FROZEN = "train a tokenizer with `evotok train`; a stage does not train it"
_REMOVED = "leave it out: this setting does not exist any more"
_ZERO3 = "--deepspeed zero3"


def _video() -> LlavaFlag:
    return LlavaFlag((), "", _NO_VIDEO)


def _no_resampler() -> LlavaFlag:
    return LlavaFlag(None, _NO_RESAMPLER)


def _freeze_language_model() -> LlavaFlag:
    note = "translated to --tune_language_model false"
    return LlavaFlag((*_TRUE, *_FALSE), note, flags=("--tune_language_model", "false"))


LLAVA: dict[str, LlavaFlag] = {
    # The model
    "version": LlavaFlag(None, _TEMPLATE),
    "conv_mode": LlavaFlag(None, _TEMPLATE),
    "model_class_name": LlavaFlag(None, "the class follows from the folder's config.json"),
    "mm_projector_type": LlavaFlag(
        ("mlp2x_gelu",), "both projectors are two-layer GELU MLPs", "leave it out: both projectors are mlp2x_gelu"
    ),
    "mm_hidden_size": LlavaFlag(None, "it follows from the tokenizer"),
    "mm_vision_select_layer": LlavaFlag(None, "images are read as the semantic features of the tokenizer"),
    "mm_vision_select_feature": LlavaFlag(
        ("patch",), "an image is read as one feature per position", "leave it out: the tokenizer has no class token"
    ),
    "vision_tower_pretrained": LlavaFlag(("", "none"), "--vision_tower names the weights", "--vision_tower FOLDER"),
    "delay_load": LlavaFlag(None, "the tokenizer is part of the model"),
    "mm_use_im_start_end": LlavaFlag((*_TRUE, *_FALSE), _DELIMITERS),
    "mm_use_im_patch_token": LlavaFlag(_FALSE, "images have a dedicated placeholder token", "leave it out"),
    "mm_patch_merge_type": LlavaFlag(("flat",), "an image is one sequence", "leave it out: only flat is supported"),
    "mm_newline_position": LlavaFlag(None, "it concerns videos"),
    "mm_resampler_type": LlavaFlag(("none", ""), _NO_RESAMPLER, "leave it out: every position is read"),
    "mm_mask_drop_mode": _no_resampler(),
    "mm_mask_drop_skip_percentage": _no_resampler(),
    "mm_mask_drop_ratio": _no_resampler(),
    "mm_mask_drop_ratio_upper": _no_resampler(),
    "mm_mask_drop_ratio_lower": _no_resampler(),
    "mm_spatial_pool_stride": _no_resampler(),
    "mm_spatial_pool_mode": _no_resampler(),
    "mm_spatial_pool_out_channels": _no_resampler(),
    "mm_perceiver_depth": _no_resampler(),
    "mm_perceiver_latents": _no_resampler(),
    "mm_perceiver_ff_mult": _no_resampler(),
    "mm_perceiver_pretrained": _no_resampler(),
    "mm_qformer_depth": _no_resampler(),
    "mm_qformer_latents": _no_resampler(),
    "mm_qformer_pretrained": _no_resampler(),
    "tune_mm_vision_resampler": LlavaFlag(_FALSE, _NO_RESAMPLER, "leave it out: the model has no resampler"),
    "freeze_mm_vision_resampler": _no_resampler(),
    "rope_scaling_factor": LlavaFlag(("none",), "the LLM's own", "set rope_parameters in the config.json of the LLM"),
    "rope_scaling_type": LlavaFlag(("none",), "the LLM's own", "set rope_parameters in the config.json of the LLM"),
    "s2": LlavaFlag(_FALSE, "an image is read at one size", _ONE_SIZE),
    "s2_scales": LlavaFlag(None, "an image is read at one size"),
    "use_pos_skipping": LlavaFlag(_FALSE, "positions are not skipped", "leave it out: it is not supported"),
    "pos_skipping_range": LlavaFlag(None, "positions are not skipped"),
    "mpt_attn_impl": LlavaFlag(None, "--attn_implementation chooses the attention"),
    # What trains
    "tune_mm_mlp_adapter": _freeze_language_model(),
    "freeze_backbone": _freeze_language_model(),
    "freeze_mm_mlp_adapter": LlavaFlag(
        (*_TRUE, *_FALSE), "translated to --tune_projectors false", flags=("--tune_projectors", "false")
    ),
    "unfreeze_language_model": LlavaFlag(
        (*_TRUE, *_FALSE), "translated to --tune_language_model true", flags=("--tune_language_model", "true")
    ),
    "unfreeze_mm_vision_tower": LlavaFlag(_FALSE, "the tokenizer stays frozen", _FROZEN),
    "mm_vision_tower_lr": LlavaFlag(("none",), "the tokenizer stays frozen", _FROZEN),
    "lora_bias": LlavaFlag(("none",), "adapters have no biases", "leave it out: only none is supported"),
    "lora_weight_path": LlavaFlag(("",), "no adapter is loaded", "merge the adapter first: evotok-llava merge"),
    # Data
    "image_aspect_ratio": LlavaFlag(
        ("pad", "square", "none"),
        "images are resized and cropped to a square, as at inference",
        "leave it out: images are resized and cropped to a square",
    ),
    "image_grid_pinpoints": LlavaFlag((), "", _ONE_SIZE),
    "image_crop_resolution": LlavaFlag((), "", _ONE_SIZE),
    "image_split_resolution": LlavaFlag((), "", _ONE_SIZE),
    "lazy_preprocess": LlavaFlag((*_TRUE, *_FALSE), "records are always encoded on demand"),
    "is_multimodal": LlavaFlag(
        _TRUE, "a stage is always multimodal", "leave it out; data_path may name text-only data"
    ),
    "early_mix_text": LlavaFlag(_FALSE, "text-only samples are batched on their own", "leave it out"),
    "group_by_varlen": LlavaFlag(_FALSE, "it is off", "--group_by_modality_length true"),
    "group_by_modality_length_auto": LlavaFlag(_FALSE, "it is off", "--group_by_modality_length true"),
    "video_folder": _video(),
    "video_fps": LlavaFlag(None, "videos are not supported"),
    "frames_upbound": LlavaFlag(("0",), "videos are not supported", _NO_VIDEO),
    "add_time_instruction": LlavaFlag(_FALSE, "videos are not supported", _NO_VIDEO),
    "force_sample": LlavaFlag(_FALSE, "videos are not supported", _NO_VIDEO),
    "add_faster_video": LlavaFlag(_FALSE, "videos are not supported", _NO_VIDEO),
    "faster_token_stride": LlavaFlag(None, "videos are not supported"),
    # The run
    "cache_dir": LlavaFlag(("none", ""), "the cache of huggingface_hub is used", "the environment variable HF_HOME"),
    "verbose_logging": LlavaFlag(_FALSE, "it is off", "leave it out; --debug shows the traceback of an error"),
    "trainer_mode": LlavaFlag(("regular",), "training uses gradients", "leave it out: only regular is supported"),
    "zo_eps": LlavaFlag(None, "training uses gradients"),
    "zo_num_directions": LlavaFlag(None, "training uses gradients"),
    "dpo_alpha": LlavaFlag((), "", "scripts/reinforce.sh, which trains drawing by rewards"),
    "beta": LlavaFlag((), "", "scripts/reinforce.sh, which trains drawing by rewards"),
    "gamma": LlavaFlag((), "", "scripts/reinforce.sh, which trains drawing by rewards"),
}

TRANSFORMERS: dict[str, LlavaFlag] = {
    "evaluation_strategy": LlavaFlag(("no",), _NO_EVAL, _NO_EVAL),
    "eval_strategy": LlavaFlag(("no",), _NO_EVAL, _NO_EVAL),
    "per_device_eval_batch_size": LlavaFlag(None, "held-out samples have the batch size of training"),
    "per_gpu_eval_batch_size": LlavaFlag(None, "held-out samples have the batch size of training"),
    "per_gpu_train_batch_size": LlavaFlag(
        None,
        "translated to --per_device_train_batch_size",
        flags=("--per_device_train_batch_size", "{}"),
    ),
    "max_seq_length": LlavaFlag(None, "translated to --model_max_length", flags=("--model_max_length", "{}")),
    "no_cuda": LlavaFlag((*_TRUE, *_FALSE), "translated to --use_cpu true", flags=("--use_cpu", "true")),
    "overwrite_output_dir": LlavaFlag(_FALSE, "a finished run is not overwritten", "--overwrite true"),
    "adafactor": LlavaFlag(_FALSE, "it is off", "--optim adafactor"),
    "group_by_length": LlavaFlag(_FALSE, "it is off", "--group_by_modality_length and --group_lengths"),
    "save_safetensors": LlavaFlag(_TRUE, "weights are always safetensors", "leave it out"),
    "logging_dir": LlavaFlag((), "", "leave it out: logs go to tensorboard/ in --output_dir"),
    "half_precision_backend": LlavaFlag(("auto",), "PyTorch's autocast is used", "leave it out"),
    "fp16_backend": LlavaFlag(("auto",), "PyTorch's autocast is used", "leave it out"),
    "fp16_opt_level": LlavaFlag((), "", "--fp16 true or --bf16 true"),
    "use_mps_device": LlavaFlag(_FALSE, "it is off", _REMOVED),
    "use_ipex": LlavaFlag(_FALSE, "it is off", _REMOVED),
    "jit_mode_eval": LlavaFlag(_FALSE, "it is off", _REMOVED),
    "torchdynamo": LlavaFlag(("none", ""), "it is off", "leave it out: compiled training is not supported"),
    "ray_scope": LlavaFlag(None, "Ray is not used"),
    "past_index": LlavaFlag(("-1",), "it is off", _REMOVED),
    "mp_parameters": LlavaFlag(("",), "SageMaker's model parallelism is not used", _ZERO3),
    "tpu_num_cores": LlavaFlag(("none",), "TPUs are not supported", _REMOVED),
    "tpu_metrics_debug": LlavaFlag(_FALSE, "TPUs are not supported", _REMOVED),
    "dispatch_batches": LlavaFlag(("none",), "the samplers divide the data", "leave it out"),
    "split_batches": LlavaFlag(("none", "false"), "the samplers divide the data", "leave it out"),
    "sharded_ddp": LlavaFlag(("",), "it is off", _ZERO3),
    "fsdp_min_num_params": LlavaFlag(("0",), "FSDP is not used", _ZERO3),
    "fsdp_transformer_layer_cls_to_wrap": LlavaFlag(("none",), "FSDP is not used", _ZERO3),
    "include_inputs_for_metrics": LlavaFlag(_FALSE, "it is off", _REMOVED),
    "include_tokens_per_second": LlavaFlag(_FALSE, "it is off", "scripts/benchmark/train_throughput.py"),
    "use_legacy_prediction_loop": LlavaFlag(_FALSE, "it is off", _REMOVED),
    "push_to_hub_model_id": LlavaFlag((), "", "upload the model folder with `hf upload`"),
    "push_to_hub_organization": LlavaFlag((), "", "upload the model folder with `hf upload`"),
    "push_to_hub_token": LlavaFlag((), "", "upload the model folder with `hf upload`"),
}

FLAGS: dict[str, LlavaFlag] = {**LLAVA, **TRANSFORMERS}


@dataclass(frozen=True)
class ValueFlag:
    """Translation of a flag that depends on its value.

    Attributes:
        note: the translation in words, for the documentation.
        translate: the flags for a value, and the notice; no flags leave the value as it is.
        is_last: whether the flags go to the end of the command line, where they take precedence.
    """

    note: str
    translate: Callable[[str], tuple[list[str], str]]
    is_last: bool = False


def translate(
    argv: Sequence[str],
    notify: Callable[[str], None],
    by_value: dict[str, ValueFlag] | None = None,
    switches: Sequence[str] = (),
) -> list[str]:
    """Replace LLaVA's flags by equivalent ones, and remove those without effect.

    Flags may be written with dashes (`--data-path`), and a switch that is on by default as `--no_NAME`, as in
    transformers.

    Args:
        notify: called with a line for every accepted flag.
        by_value: further flags, whose translation depends on their value.
        switches: names of the flags that are true or false.

    Raises:
        UserError: a flag or value that is not supported; the message names the replacement.
    """
    rest: list[str] = []
    last: list[str] = []
    position = 0
    while position < len(argv):
        argument = argv[position]
        position += 1
        if not argument.startswith("--"):
            rest.append(argument)
            continue
        written, has_value, value = argument.removeprefix("--").partition("=")
        name = written.replace("-", "_")
        flag, special = FLAGS.get(name), (by_value or {}).get(name)
        if flag is None and special is None:
            if name.removeprefix("no_") in switches and name.startswith("no_") and not has_value:
                rest += [f"--{name.removeprefix('no_')}", "false"]
            else:
                rest.append(f"--{name}{has_value}{value}")
            continue
        while not has_value and position < len(argv) and not argv[position].startswith("--"):
            value = f"{value} {argv[position]}".strip()
            position += 1
        if special is not None:
            flags, note = special.translate(value)
            (last if special.is_last else rest).extend(flags or [f"--{name}", value])
            if note:
                notify(f"--{name} {value}: {note}")
            continue
        assert flag is not None
        if flag.accepted is not None and value.lower() not in flag.accepted:
            raise UserError(f"--{name} {value}".strip() + f" of LLaVA is not supported; instead: {flag.instead}")
        if flag.flags and flag.accepted is not None and value.lower() in _FALSE:
            continue  # the same as leaving the flag out
        rest += [part.format(value) for part in flag.flags]
        notify(f"--{name} {value}".strip() + f": {flag.note}" + ("" if flag.flags else "; the flag has no effect"))
    return rest + last
