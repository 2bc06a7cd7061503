"""Held-out samples of a stage: their losses, and drawings for some of their prompts, in the course of training."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback

from evotok_plugin.data.images import open_picture
from llava_ext.data.collators import Collator
from llava_ext.data.dataset import ConversationDataset, Filler
from llava_ext.data.records import KINDS
from llava_ext.processing_evotok_llava import EvoTokLlavaProcessor
from llava_ext.training.drawn_samples import write_samples

if TYPE_CHECKING:
    from llava_ext.training.trainer import EvoTokTrainer

_NUM_PROMPTS, _NUM_DRAWINGS = 6, 4
_PACKED_BATCH = 8  # samples at once if training counts rows
_LONGEST_LABEL = 100  # characters of a prompt in a picture


@dataclass(frozen=True)
class HeldOut:
    """Held-out samples.

    Attributes:
        dataset: samples whose prompts are never emptied.
        prompts: prompts of drawing samples, which are drawn with fixed seeds.
    """

    dataset: ConversationDataset
    processor: EvoTokLlavaProcessor
    prompts: Sequence[str]


def held_out(dataset: ConversationDataset, processor: EvoTokLlavaProcessor) -> HeldOut:
    """The held-out samples of a data set, with the prompts of the first samples that draw in their only turn."""
    prompts: dict[str, None] = {}
    for index in np.flatnonzero(dataset.kinds == KINDS.index("draw")).tolist():
        messages = [message for message in dataset.records[index].messages if message["role"] != "system"]
        if len(messages) == 2 and len(dataset.records[index].images) == 1:
            prompts[messages[0]["content"]] = None
        if len(prompts) == _NUM_PROMPTS:
            break
    return HeldOut(dataset, processor, list(prompts))


class HeldOutEvaluation(TrainerCallback):
    """Evaluates held-out samples every `eval_every` steps and after the last one."""

    def __init__(self, trainer: "EvoTokTrainer", data: HeldOut) -> None:
        self._trainer, self._data = trainer, data

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self._trainer.args.eval_every and state.global_step < state.max_steps:
            return
        logs = control.should_log
        model = self._trainer.model
        was_training = model.training
        model.eval()
        try:
            self._trainer.log({f"eval_{name}": value for name, value in self._losses().items()})
            if self._data.prompts:
                self._draw(state.global_step)
        finally:
            model.train(was_training)
        control.should_log = logs  # the entry of the evaluation does not replace that of the step

    def _losses(self) -> dict[str, float]:
        trainer, dataset = self._trainer, self._data.dataset
        size = _PACKED_BATCH if trainer.args.packing else trainer.args.per_device_train_batch_size
        processes = trainer.args.processes
        mine: list[int | Filler] = list(range(processes.rank, len(dataset), processes.world_size))
        # All processes run the same number of batches: partitioned weights are gathered in every forward pass.
        most = -(-len(dataset) // processes.world_size)
        mine += [Filler(0)] * (-(-most // size) * size - len(mine))
        loader: DataLoader = DataLoader(
            dataset,
            batch_size=size,
            sampler=mine,
            collate_fn=Collator(self._data.processor),
            num_workers=trainer.args.dataloader_num_workers,
            generator=torch.Generator(),  # without one it would advance the global random state
        )
        sums = torch.zeros(2, 2, device=trainer.args.device)
        with torch.no_grad():
            for batch in loader:
                sums += trainer.sums_and_counts(batch)
        return trainer.losses_of(trainer.accelerator.reduce(sums, "sum").double().cpu())

    def _draw(self, step: int) -> None:
        """Draw every prompt several times on the first process, with the model's settings and fixed seeds."""
        trainer, prompts = self._trainer, list(self._data.prompts)
        if not trainer.can_draw or not trainer.args.processes.is_first:
            return
        rows = [prompt for prompt in prompts for _ in range(_NUM_DRAWINGS)]
        images = trainer.drawings(rows, seeds=range(len(rows)))
        labels = [prompt[:_LONGEST_LABEL] for prompt in prompts]
        path = write_samples(trainer.args.output_dir, step, labels, images)
        for callback in trainer.callback_handler.callbacks:
            writer = getattr(callback, "tb_writer", None)
            if isinstance(callback, TensorBoardCallback) and writer is not None:
                writer.add_image("drawings", _pixels_of(path), step, dataformats="HWC")


def _pixels_of(path: Any) -> np.ndarray:
    return np.asarray(open_picture(path))
