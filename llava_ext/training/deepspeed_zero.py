"""What DeepSpeed's ZeRO stage 3 asks of whoever builds a model."""

import contextlib
from collections.abc import Iterator

from transformers.integrations.deepspeed import (
    is_deepspeed_zero3_enabled,
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)

from llava_ext.training.config import StageConfig


def zero_stage(config: StageConfig) -> int:
    """0 without DeepSpeed, 3 where weights are spread over the processes."""
    engine = getattr(config, "hf_deepspeed_config", None)  # TrainingArguments has it only with DeepSpeed
    return 0 if engine is None else engine.get_value("zero_optimization.stage", 0)


@contextlib.contextmanager
def unpartitioned_models(config: StageConfig) -> Iterator[None]:
    """Within it, transformers makes and loads models whole in every process, as what looks at their weights needs it;
    at stage 3 it would spread them at once."""
    if not is_deepspeed_zero3_enabled():
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(config.hf_deepspeed_config)
