"""What DeepSpeed's ZeRO stage 3 asks of whoever builds a model."""

import contextlib
from collections.abc import Iterator

from transformers.integrations.deepspeed import (
    is_deepspeed_zero3_enabled,
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)

from llava_ext.training.config import StageConfig


def partitions_weights(config: StageConfig) -> bool:
    """Whether this run spreads its weights over the processes (stage 3)."""
    return config.hf_deepspeed_config is not None and config.hf_deepspeed_config.is_zero3()


@contextlib.contextmanager
def whole_models(config: StageConfig) -> Iterator[None]:
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
