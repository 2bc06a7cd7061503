"""The state of a tokenizer run: everything that an exact resumption needs, saved to and restored from a checkpoint."""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Adam

from evotok_plugin.common.foreign_files import reading
from evotok_plugin.common.processes import Processes
from evotok_plugin.common.weight_checks import load_strictly
from evotok_plugin.errors import UserError
from evotok_plugin.losses.adversarial import PatchDiscriminator
from evotok_plugin.modeling_evotok import EvoTokModel
from evotok_plugin.training.checkpoints import (
    load_optimizer,
    optimizer_tensors,
    part,
    read_newest,
    under,
    write_checkpoint,
)
from evotok_plugin.training.monitor import LossWatch
from evotok_plugin.training.weights_ema import WeightsEMA

logger = logging.getLogger(__name__)

_START_OVER = "pass --overwrite true to start over"


@dataclass
class TrainedDiscriminator:
    """The discriminator of a run and its optimizer."""

    model: PatchDiscriminator
    optimizer: Adam


@dataclass
class RunState:
    """The objects whose state is saved and restored; the random state of every process is part of it."""

    folder: Path
    processes: Processes
    seed: int
    model: EvoTokModel
    optimizer: Adam
    watch: LossWatch
    weights_ema: WeightsEMA | None
    discriminator: TrainedDiscriminator | None
    heads: nn.Module | None

    def save(self, step: int, keep: int) -> None:
        """Save the state after a step; the newest `keep` checkpoints are kept. All processes must call this.

        Raises:
            UserError: the checkpoint cannot be written; earlier ones are kept.
        """
        random_states = self.processes.gather(self._random_state())
        failure = None
        if self.processes.is_first:
            try:
                write_checkpoint(self.folder, step, self._tensors(step, random_states), keep)
            except UserError as error:
                failure = str(error)
        if failure := self.processes.gather(failure)[0]:
            raise UserError(failure)

    def _tensors(self, step: int, random_states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        tensors = under("model", self.model.state_dict())
        tensors |= under("quantizer", self.model.quantizer.learning_state())
        tensors |= under("optimizer", optimizer_tensors(self.optimizer))
        tensors |= under("watch", self.watch.state_dict())
        if self.weights_ema is not None:
            tensors |= under("weights_ema", self.weights_ema.state_dict())
        if self.discriminator is not None:
            tensors |= under("discriminator", self.discriminator.model.state_dict())
            tensors |= under("discriminator_optimizer", optimizer_tensors(self.discriminator.optimizer))
        if self.heads is not None:
            tensors |= under("heads", self.heads.state_dict())
        for rank, state in enumerate(random_states):
            tensors |= under(f"random.{rank}", state)
        tensors["step"] = torch.tensor(step)
        return tensors

    def restore(self) -> int | None:
        """Restore the newest readable checkpoint; returns its step, or None without checkpoints.

        Raises:
            UserError: no checkpoint can be read, or it does not fit the run.
        """
        found = read_newest(self.folder)
        if found is None:
            return None
        path, tensors = found
        with reading(path, f"restore it, or {_START_OVER}"):
            self._restore_from(path, tensors)
        step = int(tensors["step"])
        logger.info("resuming from step %d of %s", step, path)
        return step

    def _restore_from(self, path: Path, tensors: dict[str, Tensor]) -> None:
        remedy = f"restore it, or {_START_OVER}"
        load_strictly(self.model, part("model", tensors), str(path), remedy)
        self.model.quantizer.load_learning_state(part("quantizer", tensors))
        load_optimizer(self.optimizer, part("optimizer", tensors))
        self.watch.load_state_dict(part("watch", tensors))
        if self.weights_ema is not None:
            averages = part("weights_ema", tensors)
            if not averages:
                raise UserError(f"{path} was written without weights_ema; leave it out, or {_START_OVER}")
            self.weights_ema.load_state_dict(averages)
        if self.discriminator is not None:
            load_strictly(self.discriminator.model, part("discriminator", tensors), str(path), remedy)
            load_optimizer(self.discriminator.optimizer, part("discriminator_optimizer", tensors))
        if self.heads is not None:
            load_strictly(self.heads, part("heads", tensors), str(path), remedy)
        self._restore_random_state(part(f"random.{self.processes.rank}", tensors))

    def _random_state(self) -> dict[str, Tensor]:
        state, device = {"cpu": torch.get_rng_state()}, self.processes.device
        return state | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state

    def _restore_random_state(self, state: dict[str, Tensor]) -> None:
        if not state:  # more processes than before: data and codebooks do not depend on this, only level dropout does
            torch.manual_seed(self.seed + self.processes.rank)
            return
        torch.set_rng_state(state["cpu"])
        if "cuda" in state and self.processes.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], self.processes.device)
