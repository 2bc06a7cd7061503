"""Reading of research checkpoints: the only files that are unpickled, with `weights_only=True`."""

import argparse
import re
from collections.abc import Iterable
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from evotok_plugin.conversion.accounting import join_names
from evotok_plugin.errors import UserError

_CONTAINERS = ("ema", "model", "state_dict")
# Parts of tensor names by which files of the research MLLM are recognized.
_ADAPTER_MARKS = ("mm_projector.", "rqtransformer.", "pos_emb_d")


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Read the weights of a pickled checkpoint: its `ema`, `model` or `state_dict` (the first present), or itself.

    The file is read with `weights_only=True`, so it cannot run code; in addition to tensors only the plain
    `argparse.Namespace` that training scripts store is allowed.

    Raises:
        UserError: the file does not exist, is not a checkpoint, would run code, or holds weights that are not tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {str(path)!r} does not exist or is not a file")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code is None:
            raise UserError(
                f"{str(path)!r} is not a checkpoint: expected a pickle that holds only tensors; download it again"
            ) from error
        raise UserError(
            f"{str(path)!r} is rejected: it holds {code[1]}, and unpickling anything but tensors can run code; "
            "save only the state dict"
        ) from error
    except Exception as error:  # other bytes can raise almost any exception
        reason = str(error).split(". ")[0] or "the file is empty"
        raise UserError(f"{str(path)!r} is not a checkpoint: {type(error).__name__}, {reason}") from error
    if not isinstance(loaded, dict):
        raise UserError(f"{str(path)!r} is not a checkpoint: expected a dict, got a {type(loaded).__name__}")
    container = next((name for name in _CONTAINERS if name in loaded), None)
    weights = loaded if container is None else loaded[container]
    wrong = (
        [f"a {type(weights).__name__}"]
        if not isinstance(weights, dict)
        else [
            f"{name!r}: {type(value).__name__}"
            for name, value in weights.items()
            if not isinstance(name, str) or not isinstance(value, Tensor)
        ]
    )
    if wrong or not weights:
        expected = f"a dict of tensors in {container!r}" if container else "named tensors, or ema, model or state_dict"
        raise UserError(
            f"{str(path)!r} is not a checkpoint: expected {expected}, got {join_names(wrong, 3) or 'an empty dict'}"
        )
    return dict(weights)


def looks_like_adapters(weights: Iterable[str]) -> bool:
    """Whether weights with these names belong to the research MLLM's depth transformer or projector."""
    return any(mark in name for name in weights for mark in _ADAPTER_MARKS)
