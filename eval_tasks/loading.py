"""Loading of the model for lmms-eval: its folder, its dtype and its device, checked before anything large is read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from evotok_plugin.common.weight_files import folder_fingerprint
from evotok_plugin.errors import UserError
from evotok_plugin.model_folder import model_type_of

_DTYPES = ("float32", "bfloat16", "float16")


def check_checkpoint(pretrained: str | Path) -> Path:
    """The folder of a model, checked before anything large is loaded.

    Raises:
        UserError: no folder, or one of another kind of model.
    """
    wanted = "--model_args pretrained=DIR needs the output folder of scripts/finetune.sh"
    folder = Path(pretrained).expanduser()
    if not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "is not a folder"
        raise UserError(f"{wanted}, but {str(pretrained)!r} {what}")
    model_type = model_type_of(folder)
    if model_type != "evotok_llava":
        raise UserError(f"{wanted}, but {str(pretrained)!r} holds a model of type {model_type!r}, not 'evotok_llava'")
    return folder


@dataclass(frozen=True)
class LoadedModel:
    """A model on its device, ready to generate, its processor, and the fingerprint of the folder's content."""

    model: Any
    processor: Any
    fingerprint: str


def load_checkpoint(pretrained: str, dtype: torch.dtype | str, device: torch.device) -> LoadedModel:
    """Open a model folder."""
    folder = check_checkpoint(pretrained)
    from llava_ext.model_folder import load_model

    model, processor = load_model(folder, dtype)
    return LoadedModel(model.to(device).eval(), processor, folder_fingerprint(folder))


def parse_dtype(dtype: str | None, device: torch.device) -> torch.dtype | str:
    """A named dtype; else float32 on a CPU, where bfloat16 can be 200 times slower, and the checkpoint's on a GPU."""
    if dtype is None:
        return torch.float32 if device.type == "cpu" else "auto"
    if dtype not in _DTYPES:
        raise UserError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    return getattr(torch, dtype)


def parse_device(device: str | None, accelerator: Accelerator) -> torch.device:
    """The device that is asked for; of several processes each has its own of that kind.

    Raises:
        UserError: no such device, or one that several processes cannot share.
    """
    if device is None:
        return accelerator.device
    try:
        chosen = torch.device(str(device))
    except RuntimeError as error:
        raise UserError(f"device must be cpu, cuda, cuda:1, ..., got {device!r}") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {device} is not available: this torch finds no CUDA device; pass device=cpu")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {device} does not exist; there are {torch.cuda.device_count()} CUDA devices")
    if accelerator.num_processes == 1:
        return chosen
    if chosen.index is not None or chosen.type != accelerator.device.type:
        raise UserError(
            f"device {device} cannot be chosen for {accelerator.num_processes} processes, each has its own "
            f"({accelerator.device}); leave device out"
        )
    return accelerator.device
