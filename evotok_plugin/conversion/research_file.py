"""Checkpoints of the research code: the only files that are unpickled, with `weights_only=True`."""

import argparse
import re
from collections.abc import Iterable
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from evotok_plugin.conversion.accounting import _listed
from evotok_plugin.errors import UserError

_CONTAINERS = ("ema", "model", "state_dict")
# Files of the research MLLM, known by a part of their names.
_ADAPTER_MARKS = ("mm_projector.", "rqtransformer.", "pos_emb_d")


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The weights of a pickled checkpoint: of its `ema`, `model` or `state_dict`, the first present, else its own.

    Nothing in the file is run: it is read with `weights_only=True`; beside tensors only the plain
    `argparse.Namespace` that training scripts store is understood.

    Raises:
        UserError: no such file, not a checkpoint, one that would run code, or one whose weights are no tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {str(path)!r} does not exist or is no file")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code is None:
            raise UserError(
                f"{str(path)!r} is no checkpoint: it cannot be read as a pickle of tensors and nothing else"
            ) from error
        raise UserError(
            f"{str(path)!r} is refused: it holds {code[1]}, and loading more than tensors can run code; "
            "save the state dict alone"
        ) from error
    except Exception as error:  # bytes that are no pickle fail in more ways than can be listed
        reason = str(error).split(". ")[0] or "nothing in it"
        raise UserError(f"{str(path)!r} is no checkpoint: {type(error).__name__}, {reason}") from error
    if not isinstance(loaded, dict):
        raise UserError(f"{str(path)!r} is no checkpoint: expected a dict, got a {type(loaded).__name__}")
    container = next((name for name in _CONTAINERS if name in loaded), None)
    weights = loaded if container is None else loaded[container]
    wrong = (
        [f"a {type(weights).__name__}"]
        if not isinstance(weights, dict)
        else [f"{name!r}: {type(value).__name__}" for name, value in weights.items() if not isinstance(value, Tensor)]
    )
    if wrong or not weights:
        place = "it has none of ema, model, state_dict and" if container is None else f"its {container!r}"
        raise UserError(
            f"{str(path)!r} is no checkpoint: {place} is no dict of tensors ({_listed(wrong, 3) or 'it is empty'})"
        )
    return dict(weights)


def looks_like_adapters(weights: Iterable[str]) -> bool:
    """Whether the names are those of the research MLLM's depth transformer or projector, not of a tokenizer."""
    return any(mark in name for name in weights for mark in _ADAPTER_MARKS)
