"""Checks of the reporters of a run (TensorBoard, Weights & Biases), before any work."""

import os
from collections.abc import Iterable
from importlib.util import find_spec

from evotok_plugin.errors import UserError

_REMEDY = "or pass --report_to none"


def check_reporters(names: Iterable[str]) -> None:
    """Check that reporters can be used: the package is installed and, for wandb, there is an API key.

    Raises:
        UserError: a reporter cannot be used.
    """
    for name in names:
        if name == "tensorboard" and not (find_spec("tensorboard") or find_spec("tensorboardX")):
            raise UserError(f"report_to: tensorboard is not installed: `pip install tensorboard`, {_REMEDY}")
        if name == "wandb":
            _check_wandb()


def _check_wandb() -> None:
    if find_spec("wandb") is None:
        raise UserError(f"report_to: wandb is not installed: `pip install wandb`, {_REMEDY}")
    if os.environ.get("WANDB_MODE", "").lower() in ("offline", "disabled", "dryrun"):
        return
    import wandb

    if not (os.environ.get("WANDB_API_KEY") or wandb.api.api_key):
        raise UserError(
            "report_to: wandb has no API key: run `wandb login`, set WANDB_API_KEY, log to files with "
            f"WANDB_MODE=offline, {_REMEDY}"
        )
