"""Flags of LLaVA's training scripts, and of older versions of transformers, that are not flags of a stage.

A flag is translated to an equivalent one, accepted without effect (with a notice), or rejected with a replacement.
LLaVA's other flags (--mm_projector_lr, --lora_enable, --bits, --group_by_modality_length, ...) are flags of a stage.
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
        flags: the flags that an accepted value is translated to.
    """

    accepted: tuple[str, ...] | None
    note: str
    instead: str = ""
    flags: tuple[str, ...] = ()


_TEMPLATE = "the model folder's chat template is used"
_DELIMITERS = "every image has start and end tokens"
_NO_EVAL = "a stage does not evaluate"

FLAGS: dict[str, LlavaFlag] = {
    "version": LlavaFlag(None, _TEMPLATE),
    "mm_projector_type": LlavaFlag(
        ("mlp2x_gelu",), "both projectors are two-layer GELU MLPs", "leave it out: both projectors are mlp2x_gelu"
    ),
    "mm_vision_select_layer": LlavaFlag(None, "images are read as the semantic features of the tokenizer"),
    "mm_vision_select_feature": LlavaFlag(
        ("patch",), "an image is read as one feature per position", "leave it out: the tokenizer has no class token"
    ),
    "mm_use_im_start_end": LlavaFlag((*_TRUE, *_FALSE), _DELIMITERS),
    "mm_use_im_patch_token": LlavaFlag(_FALSE, "images have a dedicated placeholder token", "leave it out"),
    "mm_patch_merge_type": LlavaFlag(("flat",), "an image is one sequence", "leave it out: only flat is supported"),
    "image_aspect_ratio": LlavaFlag(
        ("pad", "square", "none"),
        "images are resized and cropped to a square, as at inference",
        "leave it out: images are resized and cropped to a square",
    ),
    "image_grid_pinpoints": LlavaFlag((), "", "leave it out: an image is read at one size"),
    "lazy_preprocess": LlavaFlag((*_TRUE, *_FALSE), "records are always encoded on demand"),
    "is_multimodal": LlavaFlag(
        _TRUE, "a stage is always multimodal", "leave it out; data_path may name text-only data"
    ),
    "evaluation_strategy": LlavaFlag(("no",), _NO_EVAL, "run scripts/evaluate.sh on the model"),
    "per_device_eval_batch_size": LlavaFlag(None, _NO_EVAL),
    "pretrain_mm_mlp_adapter": LlavaFlag(
        (), "", "--model_name_or_path FOLDER, the output folder of stage 1, which includes projectors and image head"
    ),
    "tune_mm_mlp_adapter": LlavaFlag(
        (*_TRUE, *_FALSE),
        "translated to --tune_language_model false",
        flags=("--tune_language_model", "false"),
    ),
    "freeze_mm_mlp_adapter": LlavaFlag(
        (*_TRUE, *_FALSE), "translated to --tune_projectors false", flags=("--tune_projectors", "false")
    ),
    "freeze_backbone": LlavaFlag(
        (*_TRUE, *_FALSE), "translated to --tune_language_model false", flags=("--tune_language_model", "false")
    ),
    "unfreeze_mm_vision_tower": LlavaFlag(
        _FALSE, "the tokenizer stays frozen", "train a tokenizer with `evotok train`"
    ),
    "mm_vision_tower_lr": LlavaFlag((), "", "train a tokenizer with `evotok train`; a stage does not train it"),
    "mm_tunable_parts": LlavaFlag((), "", "--tune_projectors, --tune_image_head and --tune_language_model"),
    "mm_resampler_type": LlavaFlag(("none",), "the model has no resampler", "leave it out: every position is read"),
    "lora_bias": LlavaFlag(("none",), "adapters have no biases", "leave it out: only none is supported"),
    "lora_weight_path": LlavaFlag(("",), "no adapter is loaded", "merge the adapter first: evotok-llava merge"),
    "mpt_attn_impl": LlavaFlag(None, "--attn_implementation chooses the attention"),
    "cache_dir": LlavaFlag((), "", "the environment variable HF_HOME"),
    "overwrite_output_dir": LlavaFlag(_FALSE, "a finished run is not overwritten", "--overwrite true"),
    "group_by_length": LlavaFlag(_FALSE, "it is off", "--group_by_modality_length and --group_lengths"),
    "save_safetensors": LlavaFlag(_TRUE, "weights are always safetensors", "leave it out"),
    "logging_dir": LlavaFlag((), "", "leave it out: logs go to tensorboard/ in --output_dir"),
    "video_folder": LlavaFlag((), "", "leave it out: videos are not supported"),
}


def translate(argv: Sequence[str], notify: Callable[[str], None]) -> list[str]:
    """Replace LLaVA's flags by equivalent ones, and remove those without effect.

    Args:
        notify: called with a line for every accepted flag.

    Raises:
        UserError: a flag or value that is not supported; the message names the replacement.
    """
    rest: list[str] = []
    position = 0
    while position < len(argv):
        argument = argv[position]
        name, has_value, value = argument.removeprefix("--").partition("=")
        flag = FLAGS.get(name) if argument.startswith("--") else None
        position += 1
        if flag is None:
            rest.append(argument)
            continue
        while not has_value and position < len(argv) and not argv[position].startswith("--"):
            value = f"{value} {argv[position]}".strip()
            position += 1
        if flag.accepted is not None and value.lower() not in flag.accepted:
            raise UserError(f"--{name} {value}".strip() + f" of LLaVA is not supported; instead: {flag.instead}")
        if flag.flags and value.lower() in _FALSE:
            continue  # the same as leaving the flag out
        rest += flag.flags
        notify(f"--{name} {value}".strip() + f": {flag.note}" + ("" if flag.flags else "; the flag has no effect"))
    return rest
