"""Checkpoints of a tokenizer run: safetensors files that are whole or not there, the newest few of them kept."""

import logging
import os
import re
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn, optim

logger = logging.getLogger(__name__)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = (path for path in folder.glob("checkpoint-*.safetensors") if re.fullmatch(r"checkpoint-\d+", path.stem))
    return sorted(found)


def write_checkpoint(folder: Path, step: int, tensors: dict[str, Tensor], keep: int) -> Path:
    """Write the checkpoint of a step, then remove all but the newest `keep`.

    Raises:
        ValueError: it cannot be written (a full disk); those before it stay.
    """
    path = folder / f"checkpoint-{step:09d}.safetensors"
    temporary = path.with_suffix(".tmp")
    try:
        save_file({name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}, temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise ValueError(
            f"the checkpoint of step {step} cannot be written to {folder}: {error}; {newest_kept(folder)}. "
            "Make room and run the same command again"
        ) from error
    for old in checkpoints(folder)[:-keep]:
        old.unlink()
    return path


def newest_kept(folder: Path) -> str:
    """What an error says of the checkpoints that there are."""
    found = checkpoints(folder)
    return f"{found[-1]} is kept" if found else "there is no checkpoint yet"


def read_newest(folder: Path) -> tuple[Path, dict[str, Tensor]] | None:
    """The newest checkpoint that can be read and its tensors, or None if there is none at all.

    Raises:
        ValueError: there are some, and none of them can be read.
    """
    found = checkpoints(folder)
    for path in reversed(found):
        try:
            return path, load_file(path)
        except (OSError, SafetensorError) as error:
            logger.warning("%s cannot be read (%s); trying the one before", path, error)
    if found:
        raise ValueError(
            f"none of the {len(found)} checkpoints in {folder} can be read; pass --overwrite true to begin anew"
        )
    return None


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names with the prefix put before them."""
    return {f"{prefix}.{name}": value for name, value in tensors.items()}


def part(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `under` put there, under its own names."""
    return {name[len(prefix) + 1 :]: value for name, value in tensors.items() if name.startswith(prefix + ".")}


def optimizer_tensors(optimizer: optim.Optimizer) -> dict[str, Tensor]:
    """Adam's state as named tensors: `<parameter index>.<name>`."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": value for index, values in state.items() for name, value in values.items()}


def load_optimizer(optimizer: optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Restore what `optimizer_tensors` gave; learning rates stay the optimizer's own."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def load_strictly(module: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Load weights.

    Raises:
        ValueError: they are those of another model.
    """
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(
            f"{path} is a checkpoint of another model ({error}); pass --overwrite true to begin anew"
        ) from error
