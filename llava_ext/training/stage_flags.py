"""Translation of the command line of a stage, with LLaVA's flags whose translation depends on their value."""

import typing
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

from evotok_plugin.common.recipes import reject_unknown_flags
from evotok_plugin.errors import UserError
from evotok_plugin.model_folder import model_type_of
from llava_ext.configuration_evotok_llava import EvoTokLlavaConfig
from llava_ext.training.config import StageConfig
from llava_ext.training.deepspeed_config import DEEPSPEED_FOLDER
from llava_ext.training.llava_flags import FLAGS, ValueFlag, translate

_OF_THE_COMMAND = ("recipe", "debug", "help")
_PARTS = {"mm_mlp_adapter": "--tune_projectors", "mm_language_model": "--tune_language_model"}


def _stage_1(value: str) -> tuple[list[str], str]:
    folder = Path(value).parent if value.endswith(".bin") else Path(value)
    try:
        is_model = model_type_of(folder) == EvoTokLlavaConfig.model_type
    except UserError:
        is_model = False
    if not is_model:
        raise UserError(
            f"--pretrain_mm_mlp_adapter {value}: expected the output folder of stage 1 (or a path in it), which "
            "includes LLM, projectors and image head; or leave the flag out and pass --model_name_or_path FOLDER"
        )
    return ["--model_name_or_path", str(folder)], f"translated to --model_name_or_path {folder}, which includes the LLM"


def _tunable_parts(value: str) -> tuple[list[str], str]:
    parts = [part.strip() for part in value.split(",") if part.strip()]
    unknown = [part for part in parts if part not in _PARTS]
    if unknown or not parts:
        raise UserError(
            f"--mm_tunable_parts {value} of LLaVA is not supported: expected some of {', '.join(_PARTS)}"
            f"{f', got {unknown[0]}' if unknown else ''}; the tokenizer is trained with `evotok train`"
        )
    flags = [word for part, flag in _PARTS.items() for word in (flag, str(part in parts).lower())]
    return flags, f"translated to {' '.join(flags)}"


def _deepspeed(value: str) -> tuple[list[str], str]:
    path = Path(value)
    if path.suffix != ".json" or path.is_file() or not (DEEPSPEED_FOLDER / path.name).is_file():
        return [], ""
    return ["--deepspeed", path.stem], f"the file does not exist; the project's configuration {path.stem} is used"


VALUE_FLAGS: dict[str, ValueFlag] = {
    "pretrain_mm_mlp_adapter": ValueFlag(
        "the output folder of stage 1: translated to `--model_name_or_path`, since the folder includes the LLM",
        _stage_1,
        is_last=True,
    ),
    "mm_tunable_parts": ValueFlag(
        "translated to `--tune_projectors` and `--tune_language_model`; an error with `mm_vision_tower`",
        _tunable_parts,
    ),
    "deepspeed": ValueFlag(
        "a JSON file, or `zero2`, `zero3`, `zero3_offload`; a missing file of these names is replaced by the project's",
        _deepspeed,
    ),
}


def translate_flags(
    argv: Sequence[str], notify: Callable[[str], None], schema: type[StageConfig] = StageConfig
) -> list[str]:
    """The command line of a stage with LLaVA's flags, and those of older versions of transformers, translated.

    Args:
        notify: called with a line for every flag that is translated or has no effect.

    Raises:
        UserError: a flag or value that is not supported; the message names the replacement, or the nearest flag of
            LLaVA or of the stage for an unknown one.
    """
    hints = typing.get_type_hints(schema)
    switches = [one.name for one in fields(schema) if bool in (hints[one.name], *typing.get_args(hints[one.name]))]
    translated = translate(argv, notify, VALUE_FLAGS, switches)
    own = {f"--{name}" for name in (*(one.name for one in fields(schema)), *_OF_THE_COMMAND)}
    unknown = [word for word in translated if word.startswith("--") and word.partition("=")[0] not in own]
    reject_unknown_flags(unknown, [*own, *(f"--{name}" for name in (*FLAGS, *VALUE_FLAGS))])
    return translated
