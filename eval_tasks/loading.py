"""Loading of the model for lmms-eval, with the dtype and device of `--model_args`."""

import torch
from accelerate import Accelerator

from evotok_plugin.common.files import user_path
from evotok_plugin.common.processes import resolve_device
from evotok_plugin.errors import UserError
from llava_ext.model_folder import OpenModel, open_model

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_checkpoint(pretrained: str, dtype: torch.dtype | str, device: torch.device) -> OpenModel:
    """Open a model folder.

    Raises:
        UserError: not a complete model folder; the message names `pretrained`.
    """
    try:
        return open_model(user_path(pretrained), device, dtype)
    except UserError as error:
        raise UserError(f"--model_args pretrained={pretrained}: {error}") from error


def choose_dtype(dtype: str | None, device: torch.device) -> torch.dtype | str:
    """The dtype of a name; by default float32 on a CPU, where bfloat16 can be 200 times slower, and "auto" elsewhere.

    Raises:
        UserError: an unknown name.
    """
    if dtype is None:
        return torch.float32 if device.type == "cpu" else "auto"
    if dtype not in _DTYPES:
        raise UserError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    return _DTYPES[dtype]


def choose_device(device: str | None, accelerator: Accelerator) -> torch.device:
    """The device of a name; each of several processes uses its own device of that kind.

    Raises:
        UserError: an unavailable device, or one that several processes cannot share.
    """
    if device is None:
        return accelerator.device
    chosen = resolve_device(str(device))
    if accelerator.num_processes == 1:
        return chosen
    if chosen.index is not None or chosen.type != accelerator.device.type:
        raise UserError(
            f"device {device} cannot be chosen for {accelerator.num_processes} processes, each of which has its own "
            f"({accelerator.device}); leave device out"
        )
    return accelerator.device
