"""Monitoring of a run: figures and pictures, exploding losses, collapsing levels."""

import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from evotok_plugin.common.files import write_text, writing
from evotok_plugin.errors import UserError
from evotok_plugin.metrics.codes import CodeUsage
from evotok_plugin.training.metrics_file import append_metrics

logger = logging.getLogger(__name__)

_DECAY = 0.99  # of the running means
_WARMUP = 100  # steps before the running means are used
_IN_A_ROW = 10
_UNBOUNDED = ("gan", "gradient_norm")  # of any size; the adversarial term also of any sign


class LossWatch:
    """Detects losses that are NaN or infinite, or explode.

    A term has exploded when it is far above the running mean of the total loss for several steps in a row: the growth
    of a small term by a large factor is harmless.
    """

    def __init__(self, max_growth: float) -> None:
        self._max_growth = max_growth
        self._means: dict[str, float] = {}
        self._seen: dict[str, int] = {}
        self._above: dict[str, int] = {}

    def check(self, terms: dict[str, float]) -> None:
        """Check the terms of a step and add them to the running means.

        Raises:
            UserError: a term is NaN or infinite, or has exploded.
        """
        for name, value in terms.items():
            if not math.isfinite(value):
                raise UserError(f"the {name} loss is {value}")
        bounded = {name: value for name, value in terms.items() if name not in _UNBOUNDED}
        usual = sum(self._means.get(name, 0.0) for name in bounded)
        for name, value in bounded.items():
            self._check_growth(name, value, usual)

    def _check_growth(self, name: str, value: float, usual: float) -> None:
        mean, seen = self._means.get(name, 0.0), self._seen.get(name, 0)
        if seen >= _WARMUP and value > self._max_growth * usual > 0:
            self._above[name] = self._above.get(name, 0) + 1
            if self._above[name] >= _IN_A_ROW:
                raise UserError(
                    f"the {name} loss is {value:.4g}, more than {self._max_growth:g} times the previous total loss, "
                    f"{usual:.4g}, for {_IN_A_ROW} steps (max_loss_growth)"
                )
            return
        self._above[name] = 0
        decay = min(_DECAY, seen / (seen + 1))
        self._means[name], self._seen[name] = decay * mean + (1 - decay) * value, seen + 1

    def state_dict(self) -> dict[str, Tensor]:
        """Running mean, number of steps, and steps above the limit in a row, by term."""
        return {
            name: torch.tensor([self._means[name], self._seen[name], self._above.get(name, 0)], dtype=torch.float64)
            for name in self._means
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore a state that `state_dict` returned."""
        for name, values in state.items():
            self._means[name], seen, above = values.tolist()
            self._seen[name], self._above[name] = int(seen), int(above)


def collapsed_levels(usage: CodeUsage, min_usage: float) -> list[str]:
    """One line for every level (from 1) that uses less than a fraction `min_usage` of the codes it could have used."""
    share, usable = usage.usage(), min(1.0, usage.num_codes() / usage.counts.shape[1])
    return [
        f"level {level}: {value:.1%} of the codes in use, perplexity {perplexity:.1f}"
        for level, (value, perplexity) in enumerate(zip(share, usage.perplexity(), strict=True), start=1)
        if value < min_usage * usable
    ]


class Reporter:
    """Writes figures to `metrics.jsonl`, and figures and pictures to TensorBoard and Weights & Biases if requested.

    Args:
        resumed_at: the step after which the run continues. TensorBoard then hides what a killed run reported after it.

    Raises:
        UserError: the package of a requested reporter is not installed, or a file cannot be written.
    """

    def __init__(self, folder: Path, reporters: Sequence[str], settings: dict, resumed_at: int = 0) -> None:
        with writing(folder):
            self._open(folder, reporters, settings, resumed_at)

    def _open(self, folder: Path, reporters: Sequence[str], settings: dict, resumed_at: int) -> None:
        self._folder, self._writer, self._run = folder, None, None
        if "tensorboard" in reporters:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError(
                    "tensorboard is not installed: `pip install tensorboard`, or --report_to none"
                ) from None
            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_at + 1)
        if "wandb" in reporters:
            try:
                import wandb
            except ImportError:
                raise UserError("wandb is not installed: `pip install wandb`, or --report_to tensorboard") from None
            self._run = wandb.init(
                project="evotok", dir=str(folder), id=_run_id(folder), resume="allow", config=settings
            )

    def figures(self, step: int, values: dict[str, float]) -> None:
        """Report the figures of a step."""
        append_metrics(self._folder, step, {name: round(value, 6) for name, value in values.items()})
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
        if self._run is not None:
            self._run.log(values, step=step)

    def picture(self, step: int, name: str, picture: Image.Image) -> None:
        """Report a picture to TensorBoard and Weights & Biases."""
        if self._writer is not None:
            self._writer.add_image(name, np.array(picture), step, dataformats="HWC")
        if self._run is not None:
            import wandb

            self._run.log({name: wandb.Image(picture)}, step=step)

    def close(self) -> None:
        """Flush and close the reporters."""
        if self._writer is not None:
            self._writer.close()
        if self._run is not None:
            self._run.finish()


def _run_id(folder: Path) -> str:
    """The identifier of the folder's run in Weights & Biases, the same whenever the run is resumed."""
    file = folder / "wandb_id"
    if not file.is_file():
        write_text(file, f"{time.time_ns():x}")
    return file.read_text()
