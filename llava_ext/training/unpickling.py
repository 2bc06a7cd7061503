"""Unpickling of a checkpoint without running code: tensors, plain values and a few classes of DeepSpeed."""

import contextlib
import os
from collections.abc import Iterator
from pickle import UnpicklingError
from typing import Any

import torch

from evotok_plugin.errors import UserError

_ONLY_TENSORS, _ANYTHING = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


@contextlib.contextmanager
def unpickling_without_code(what: object) -> Iterator[None]:
    """Make every `torch.load` in the block reject a pickle that could run code, DeepSpeed's own calls included.

    DeepSpeed passes `weights_only=False`, which only PyTorch's switch in the environment overrides.

    Args:
        what: the checkpoint that is read, for the error.

    Raises:
        UserError: a pickle contains anything but tensors, plain values and DeepSpeed's own classes of a checkpoint.
    """
    before = {name: os.environ.pop(name, None) for name in (_ONLY_TENSORS, _ANYTHING)}
    os.environ[_ONLY_TENSORS] = "1"
    try:
        with torch.serialization.safe_globals(_classes_of_deepspeed()):
            yield
    except UnpicklingError as error:
        reason = " ".join(str(error).split()).partition("Please")[0].strip()
        raise UserError(
            f"{what} is not resumed, because a file in it is damaged or could run code: {reason[-300:]}; restore it, "
            "or pass --overwrite true to start over"
        ) from error
    finally:
        del os.environ[_ONLY_TENSORS]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _classes_of_deepspeed() -> list[Any]:
    """The classes in DeepSpeed's optimizer states; they hold numbers, and creating one runs no code of the pickle."""
    try:
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address
    except ImportError:  # training without DeepSpeed
        return []
    return [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
