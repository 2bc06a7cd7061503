"""The DeepSpeed configuration of a stage: where it is found, its ZeRO stage, and loading models under ZeRO-3."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers.integrations.deepspeed import (
    is_deepspeed_zero3_enabled,
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)

from evotok_plugin.errors import UserError
from llava_ext.training.config import StageConfig

DEEPSPEED_FOLDER = Path(__file__).resolve().parents[1] / "deepspeed"


def find_deepspeed_config(name_or_path: str) -> Path:
    """A DeepSpeed JSON file by path, or by bare name among those of the project (`zero2`).

    Raises:
        UserError: it does not exist.
    """
    for path in (Path(name_or_path), DEEPSPEED_FOLDER / f"{name_or_path}.json"):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.stem for path in DEEPSPEED_FOLDER.glob("*.json")))
    raise UserError(f"DeepSpeed configuration {name_or_path!r} not found; expected a JSON file or one of: {known}")


def read_deepspeed_config(config: str | dict[str, Any] | None) -> dict[str, Any] | None:
    """A DeepSpeed configuration, given as a mapping or as a name or path; None for training without DeepSpeed.

    Raises:
        UserError: it does not exist, or is not a JSON object.
    """
    if config is None or config == "none":
        return None
    if isinstance(config, dict):
        return config
    path = find_deepspeed_config(config)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"DeepSpeed configuration {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"DeepSpeed configuration {path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"DeepSpeed configuration {path}: expected a JSON object, got {type(content).__name__}")
    return content


def zero_stage(config: StageConfig) -> int:
    """The ZeRO stage of a prepared config: 3 if weights are partitioned among processes, 0 without DeepSpeed."""
    engine = getattr(config, "hf_deepspeed_config", None)  # TrainingArguments has it only with DeepSpeed
    return 0 if engine is None else engine.get_value("zero_optimization.stage", 0)


@contextlib.contextmanager
def unpartitioned_models(config: StageConfig) -> Iterator[None]:
    """Make transformers load complete models in every process, for code that looks at their weights.

    At ZeRO stage 3 it would partition them among the processes while it loads them.
    """
    if not is_deepspeed_zero3_enabled():
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(config.hf_deepspeed_config)
