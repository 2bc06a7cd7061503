"""Hugging Face's Trainer with learning rates of their own for the parts, both losses apart, whole checkpoints, one
progress bar and a JSONL log."""

import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from evotok_plugin.errors import UserError
from llava_ext.data.packing import PackedDataset
from llava_ext.data.samplers import EpochSampler, FilledSampler, ModalityGroupedSampler, PackingSampler
from llava_ext.folding import count_learned
from llava_ext.model_folder import save_model
from llava_ext.modeling_evotok_llava import EvoTokLlavaOutput
from llava_ext.new_tokens import load_rows, save_rows
from llava_ext.training.adapters import load_adapter, save_adapter
from llava_ext.training.callbacks import MetricsFile, ProgressBar, StopOnSignal, on_any_process
from llava_ext.training.checkpoints import (
    RunShape,
    barrier,
    checkpoint_folder,
    checkpoints,
    claim_checkpoint,
    delete_checkpoint,
    finish_checkpoint,
)
from llava_ext.training.parameter_groups import is_decayed, learning_rates, split_by_group

logger = logging.getLogger(__name__)


class EvoTokTrainer(Trainer):
    """Trains an `EvoTokLlavaForConditionalGeneration`, as it is or with adapters, its tokenizer set aside, on a
    `ConversationDataset`.

    Args:
        shape: what a checkpoint of this run can be resumed as.
        base: what the adapters stand on (`adapters.describe_base`), for a model that has some.
    """

    def __init__(self, model, *args, shape: RunShape, base: dict | None = None, **kwargs) -> None:
        super().__init__(model, *args, **kwargs)
        model.vision_tower.to(self.args.device)
        self._shape, self._base = shape, base
        # Trainer would divide a loss by the number of micro-batches; `compute_loss` divides it by the step's tokens.
        self.model_accepts_loss_kwargs = True
        self._step_losses: list[Tensor] = []  # (text, image) of every micro-batch of the step
        self._logged = torch.zeros(2, 2, device=self.args.device)  # sums and counts of (text, image) since the last log
        self._total = torch.zeros(2, 2, dtype=torch.float64)  # the same since the start
        self.interruption = StopOnSignal()
        for default in (ProgressCallback, PrinterCallback):
            self.remove_callback(default)
        for callback in (StepChecks(self), self.interruption, ProgressBar(), MetricsFile()):
            self.add_callback(callback)

    # Steps ---------------------------------------------------------------------------------------------------

    def create_optimizer(self, model=None):
        """Trainer's optimizer, its groups split so that every part learns at its own rate."""
        optimizer, rates = super().create_optimizer(model), learning_rates(self.args)
        if hasattr(optimizer, "param_groups"):
            names = {parameter: name for name, parameter in self.model.named_parameters()}
            optimizer.param_groups = split_by_group(optimizer.param_groups, names, rates)
        elif len(set(rates.values())) > 1:
            raise UserError(
                "the DeepSpeed configuration brings its own optimizer, which knows one learning rate; "
                'remove its "optimizer" block, or leave out mm_projector_lr, image_head_lr and language_model_lr'
            )
        return optimizer

    def get_decay_parameter_names(self, model) -> list[str]:
        return [name for name in super().get_decay_parameter_names(model) if is_decayed(name)]

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor]:
        """The micro-batches of a step, and how many text tokens and image positions all processes learn in it, (2,)."""
        batches = list(islice(epoch_iterator, num_batches))
        counts = torch.zeros(2, device=device)
        for batch in batches:
            segments = batch.get("segment_ids", batch.get("attention_mask"))
            learned = count_learned(batch["labels"], self.model.vocabulary, segments)
            counts += torch.stack([learned.text_tokens, learned.image_positions]).to(counts)
        return batches, self.accelerator.reduce(counts, "sum")

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, EvoTokLlavaOutput]:
        """A micro-batch's share of the step's loss: sums over text tokens and over image positions, divided by their
        numbers in the whole step.

        Args:
            num_items_in_batch: of `get_batch_samples`, (2,); without it the micro-batch counts as a step.
        """
        outputs = model(**inputs)
        means = torch.stack([outputs.text_loss, outputs.image_loss]).float()
        counts = torch.stack([outputs.num_text_tokens, outputs.num_image_positions]).to(means)
        in_step = counts if num_items_in_batch is None else num_items_in_batch.to(means)
        weights = means.new_tensor([self.args.text_loss_weight, self.args.image_loss_weight])
        loss = (weights * means * counts / in_step.clamp(min=1)).sum()
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP and DeepSpeed average gradients over processes
        if model.training:
            self._step_losses.append(means.detach())
            self._logged += torch.stack([means.detach() * counts, counts])
        return (loss, outputs) if return_outputs else loss

    def check_step(self) -> None:
        """Look at the losses of the step that has just been made.

        Raises:
            FloatingPointError: on all processes, if one is NaN or infinite on any; nothing of the step is saved.
        """
        losses = torch.stack(self._step_losses)
        self._step_losses = []
        broken = int(not bool(losses.isfinite().all()))
        if on_any_process([broken], self.args.device)[0]:
            text, image = losses[~losses.isfinite().all(dim=1)][0].tolist() if broken else ("?", "?")
            raise FloatingPointError(
                f"step {self.state.global_step}: the loss is NaN or infinite (text {text}, image {image}"
                f"{'' if broken else ': on another process'}); the last checkpoint is kept. "
                "Check the data and run the same command again, or start over with a lower --learning_rate"
            )

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Log with Trainer, the losses replaced by those over all tokens since the last log, or since the start."""
        if "loss" in logs:
            window = self.accelerator.reduce(self._logged, "sum").double().cpu()
            self._logged, self._total = torch.zeros_like(self._logged), self._total + window
            logs.update(self._losses_of(window))
        if "train_loss" in logs and bool(self._total[1].any()):
            logs["train_loss"] = self._losses_of(self._total)["loss"]
        super().log(logs, *args, **kwargs)

    def _losses_of(self, sums_and_counts: Tensor) -> dict[str, float]:
        """Losses of (2, 2) sums and counts of text tokens and image positions; one over nothing is left out."""
        weights, losses = (self.args.text_loss_weight, self.args.image_loss_weight), {"loss": 0.0}
        for name, weight, total, count in zip(
            ("text_loss", "image_loss"), weights, *sums_and_counts.tolist(), strict=True
        ):
            if count:
                losses["loss"] += weight * total / count
                losses[name] = round(total / count, 5)
        return losses

    def _get_train_sampler(self, train_dataset=None):
        sampler, joint_batch = self._order_of(train_dataset), self.args.train_batch_size * self.args.world_size
        if self.args.world_size == 1 or self.args.dataloader_drop_last:
            return sampler
        return FilledSampler(sampler, joint_batch)

    def _order_of(self, train_dataset=None) -> Sampler:
        """The samples of an epoch, or the packed rows, in their order."""
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        epoch_of = lambda: self.state.epoch or 0  # noqa: E731
        if isinstance(dataset, PackedDataset):
            lengths, order_of = dataset.dataset.lengths, dataset.dataset.order
            sampler = PackingSampler(lengths, self.args.model_max_length, self.args.seed, epoch_of, order_of)
            logger.info("  packed into %d rows an epoch, %.1f %% full", len(sampler), 100 * sampler.efficiency)
            return sampler
        if not self.args.group_by_modality_length:
            return EpochSampler(dataset.order, len(dataset), epoch_of)
        return ModalityGroupedSampler(
            kinds=dataset.kinds,
            batch_size=self.args.per_device_train_batch_size * self.args.world_size,
            seed=self.args.seed,
            epoch_of=epoch_of,
            lengths=dataset.lengths if self.args.group_lengths else None,
            order_of=dataset.order,
        )

    # Checkpoints ---------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model, trial) -> None:
        """Write a checkpoint, mark it as whole, and only then drop the oldest.

        Raises:
            UserError: it cannot be written (a full disk); those before it stay.
        """
        folder = checkpoint_folder(self.args.output_dir, self.state.global_step)
        keep, self.args.save_total_limit = self.args.save_total_limit, None  # Trainer would drop one before
        try:
            foreign = claim_checkpoint(folder) if self.args.should_save else set()
            barrier()  # no process writes before the first has seen which files are there
            super()._save_checkpoint(model, trial)
            finish_checkpoint(folder, self._shape, self.args.should_save, keep, foreign)
        except (OSError, RuntimeError, SafetensorError) as error:
            if self.args.should_save:
                delete_checkpoint(folder)
            kept = checkpoints(self.args.output_dir)
            raise UserError(
                f"the checkpoint of step {self.state.global_step} cannot be written: {error}; "
                f"{f'{kept[-1]} is kept' if kept else 'there is none before it'}. "
                "Make room and run the same command again"
            ) from error
        finally:
            self.args.save_total_limit = keep

    def _save(self, output_dir=None, state_dict=None) -> None:
        """The model folder, or what is trained of it; no pickle of the arguments, recipe.yaml holds them as text."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        weights = self.model.state_dict() if state_dict is None else state_dict
        if isinstance(self.model, PeftModel):
            save_adapter(self.model, folder, weights, self._base)
        else:
            save_model(self.model, folder, weights)
            save_rows(self.model, folder, weights)
            self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        if isinstance(self.model, PeftModel):
            load_adapter(self.model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            load_rows(self.model, Path(resume_from_checkpoint))


class StepChecks(TrainerCallback):
    """After every step: is the loss a number? After the last: save, whatever the strategy, the model is made of it."""

    def __init__(self, trainer: EvoTokTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        # A resumed state brings the intervals that it was saved with; those of the command take effect.
        state.compute_steps(args, state.max_steps)

    def on_step_end(self, args, state, control, **kwargs):
        self._trainer.check_step()
        if state.global_step >= state.max_steps:
            control.should_save = True
