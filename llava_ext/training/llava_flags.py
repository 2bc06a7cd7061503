"""Flags of LLaVA's own training scripts (and of older versions of transformers) that a stage does not have.

Each has the same meaning as another flag, is accepted without effect and said so, or is refused with what replaces it.
LLaVA's other flags (--mm_projector_lr, --lora_enable, --bits, --group_by_modality_length, ...) are flags of a stage.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from evotok_plugin.errors import UserError

_TRUE, _FALSE = ("true", "yes", "1", ""), ("false", "no", "0", "none")


@dataclass(frozen=True)
class LlavaFlag:
    """Interpretation of a flag.

    Attributes:
        accepted: the values that are accepted, in lower case; None for any.
        note: why an accepted flag has no effect, or what it is read as.
        instead: what replaces a value that is not accepted.
        flags: the flags that an accepted value is read as.
    """

    accepted: tuple[str, ...] | None
    note: str
    instead: str = ""
    flags: tuple[str, ...] = ()


_HISTORY = "the model folder's chat template is used"
_DELIMITERS = "an image always has its own start and end tokens"
_NO_EVAL = "a stage does not evaluate"

FLAGS: dict[str, LlavaFlag] = {
    "version": LlavaFlag(None, _HISTORY),
    "mm_projector_type": LlavaFlag(
        ("mlp2x_gelu",), "both projectors are two-layer GELU MLPs", "leave it out: both projectors are mlp2x_gelu"
    ),
    "mm_vision_select_layer": LlavaFlag(None, "the tokenizer's semantic features are read"),
    "mm_vision_select_feature": LlavaFlag(
        ("patch",), "one feature a position is read", "leave it out: there is no class token to add"
    ),
    "mm_use_im_start_end": LlavaFlag((*_TRUE, *_FALSE), _DELIMITERS),
    "mm_use_im_patch_token": LlavaFlag(_FALSE, "images have a placeholder token of their own", "leave it out"),
    "mm_patch_merge_type": LlavaFlag(("flat",), "an image is one sequence", "leave it out: only flat is supported"),
    "image_aspect_ratio": LlavaFlag(
        ("pad", "square", "none"),
        "images are resized and cropped to a square, as at inference",
        "leave it out: images are resized and cropped to a square",
    ),
    "image_grid_pinpoints": LlavaFlag((), "", "leave it out: an image is read at one size"),
    "lazy_preprocess": LlavaFlag((*_TRUE, *_FALSE), "records are always encoded when they are needed"),
    "is_multimodal": LlavaFlag(_TRUE, "a stage is always multimodal", "leave it out; text-only data may be mixed in"),
    "evaluation_strategy": LlavaFlag(("no",), _NO_EVAL, "run scripts/evaluate.sh on the model"),
    "per_device_eval_batch_size": LlavaFlag(None, _NO_EVAL),
    "pretrain_mm_mlp_adapter": LlavaFlag(
        (), "", "--model_name_or_path FOLDER, the output folder of stage 1, which holds projectors and image head"
    ),
    "tune_mm_mlp_adapter": LlavaFlag(
        (*_TRUE, *_FALSE),
        "read as --tune_language_model false",
        flags=("--tune_language_model", "false"),
    ),
    "freeze_mm_mlp_adapter": LlavaFlag(
        (*_TRUE, *_FALSE), "read as --tune_projectors false", flags=("--tune_projectors", "false")
    ),
    "freeze_backbone": LlavaFlag(
        (*_TRUE, *_FALSE), "read as --tune_language_model false", flags=("--tune_language_model", "false")
    ),
    "unfreeze_mm_vision_tower": LlavaFlag(
        _FALSE, "the tokenizer stays frozen", "train a tokenizer with `evotok train`"
    ),
    "mm_vision_tower_lr": LlavaFlag((), "", "train a tokenizer with `evotok train`; it is frozen in a stage"),
    "mm_tunable_parts": LlavaFlag((), "", "--tune_projectors, --tune_image_head and --tune_language_model"),
    "mm_resampler_type": LlavaFlag(("none",), "there is no resampler", "leave it out: every position is read"),
    "lora_bias": LlavaFlag(("none",), "adapters have no biases", "leave it out: only none is supported"),
    "lora_weight_path": LlavaFlag(("",), "no adapter is loaded", "merge the adapter first: evotok-llava merge"),
    "mpt_attn_impl": LlavaFlag(None, "--attn_implementation chooses the attention"),
    "cache_dir": LlavaFlag((), "", "the environment variable HF_HOME"),
    "overwrite_output_dir": LlavaFlag(_FALSE, "nothing is overwritten", "--overwrite true"),
    "group_by_length": LlavaFlag(_FALSE, "it is off", "--group_by_modality_length and --group_lengths"),
    "save_safetensors": LlavaFlag(_TRUE, "weights are always safetensors", "leave it out"),
    "logging_dir": LlavaFlag((), "", "leave it out: logs go to tensorboard/ in --output_dir"),
    "video_folder": LlavaFlag((), "", "leave it out: videos are not supported"),
}


def translate(argv: Sequence[str], notify: Callable[[str], None]) -> list[str]:
    """Arguments without LLaVA's flags: those with an equivalent are replaced, the others left out.

    Args:
        notify: receives a line for every flag that is accepted.

    Raises:
        UserError: a flag with a value that would change the training; the message names what replaces it.
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
            continue  # as if it were not given
        rest += flag.flags
        notify(f"--{name} {value}".strip() + f": {flag.note}" + ("" if flag.flags else "; the flag has no effect"))
    return rest
