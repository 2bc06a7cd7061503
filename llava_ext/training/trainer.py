"""Hugging Face's Trainer with a learning rate per parameter group, separate losses and complete checkpoints."""

import logging
import math
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from PIL.Image import Image
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from evotok_plugin.common.files import writing
from evotok_plugin.common.foreign_files import describe_error
from evotok_plugin.errors import UserError
from llava_ext.data.dataset import ConversationDataset
from llava_ext.data.packing import PackedDataset
from llava_ext.data.samplers import EpochSampler, FilledSampler, ModalityGroupedSampler, PackingSampler
from llava_ext.folding import count_learned
from llava_ext.model_folder import save_model
from llava_ext.modeling_evotok_llava import EvoTokLlavaForConditionalGeneration, EvoTokLlavaOutput
from llava_ext.new_tokens import load_rows, save_rows
from llava_ext.training.adapters import load_adapter, save_adapter
from llava_ext.training.callbacks import LOSSES, MetricsFile, ProgressBar, StopOnSignal, on_any_process, open_event_file
from llava_ext.training.checkpoints import (
    RunShape,
    checkpoint_folder,
    checkpoints,
    claim_checkpoint,
    delete_checkpoint,
    finish_checkpoint,
    steps_of,
)
from llava_ext.training.config import StageConfig
from llava_ext.training.heldout import HeldOut, HeldOutEvaluation
from llava_ext.training.parameter_groups import is_decayed, learning_rates, plain_model, split_by_group
from llava_ext.training.unpickling import unpickling_without_code

logger = logging.getLogger(__name__)


class EvoTokTrainer(Trainer):
    """Trains an `EvoTokLlavaForConditionalGeneration` on a `ConversationDataset`, in full or through adapters.

    The tokenizer of the model has been set aside (`model_folder.set_tower_aside`), so Trainer does not see it.

    Args:
        args: a config for which `launch.prepare_processes` has been called.
        shape: properties of the run that a resumed run must share.
        base: description of the model that adapters are trained on (`adapters.describe_base`); None without adapters.
        heldout: samples that are evaluated every `eval_every` steps.
    """

    args: StageConfig
    shown_metrics: tuple[str, ...] = LOSSES  # in the progress bar
    model: EvoTokLlavaForConditionalGeneration | PeftModel

    def __init__(
        self,
        model: EvoTokLlavaForConditionalGeneration | PeftModel,
        args: StageConfig,
        *,
        shape: RunShape,
        base: dict[str, Any] | None = None,
        heldout: HeldOut | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, args, **kwargs)
        plain_model(model).vision_tower.to(args.device)  # type: ignore[arg-type]  # transformers' decorator hides `self`
        self._shape, self._base, self._processes = shape, base, args.processes
        # Trainer would divide a loss by the number of micro-batches; `compute_loss` divides it by the step's tokens.
        self.model_accepts_loss_kwargs = True
        self._step_losses: list[Tensor] = []  # (text, image) of every micro-batch of the step
        self._logged = torch.zeros(2, 2, device=args.device)  # sums and counts of (text, image) since the last log
        self._total = torch.zeros(2, 2, dtype=torch.float64)  # the same since the start
        self.interruption = StopOnSignal(self._processes)
        for default in (ProgressCallback, PrinterCallback):
            self.remove_callback(default)
        for callback in (StepChecks(self), self.interruption, ProgressBar(self.shown_metrics), MetricsFile()):
            self.add_callback(callback)
        if heldout is not None:
            self.add_callback(HeldOutEvaluation(self, heldout))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as Trainer does; a checkpoint is read without running code from it.

        Raises:
            UserError: a file of the checkpoint is damaged or contains code.
        """
        resumed_at = steps_of(Path(resume_from_checkpoint)) if isinstance(resume_from_checkpoint, str) else 0
        if resume_from_checkpoint is not True:  # Trainer then searches the checkpoint itself: its step is unknown here
            open_event_file(self.callback_handler.callbacks, self.args, resumed_at)
        if not resume_from_checkpoint:
            return super().train(None, *args, **kwargs)
        with unpickling_without_code(resume_from_checkpoint):
            return super().train(resume_from_checkpoint, *args, **kwargs)

    # Steps ---------------------------------------------------------------------------------------------------

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """Create the optimizer and the engine as Trainer does.

        Raises:
            UserError: optimizer, scheduler or DeepSpeed settings that PyTorch, transformers or DeepSpeed rejects.
        """
        try:
            return super()._prepare_for_training(*args, **kwargs)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(
                f"training cannot start: {describe_error(error)}; change the settings of the optimizer, the schedule "
                "or DeepSpeed"
            ) from error

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Create Trainer's optimizer and split its groups, so that each parameter group has its own learning rate.

        Raises:
            UserError: different learning rates with an optimizer of the DeepSpeed configuration.
        """
        optimizer, rates = super().create_optimizer(model), learning_rates(self.args)
        if hasattr(optimizer, "param_groups"):
            names: dict[Tensor, str] = {parameter: name for name, parameter in self.model.named_parameters()}
            optimizer.param_groups = split_by_group(optimizer.param_groups, names, rates)
        elif len(set(rates.values())) > 1:
            raise UserError(
                "the DeepSpeed configuration defines its own optimizer, which has a single learning rate; "
                'remove its "optimizer" block, or leave out mm_projector_lr, image_head_lr and language_model_lr'
            )
        return optimizer

    def create_scheduler(self, *args: Any, **kwargs: Any) -> torch.optim.lr_scheduler.LRScheduler:
        """Create the learning rate schedule as Trainer does.

        Raises:
            UserError: arguments that the schedule rejects.
        """
        try:
            return super().create_scheduler(*args, **kwargs)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"lr_scheduler_type {self.args.lr_scheduler_type} with lr_scheduler_kwargs "
                f"{self.args.lr_scheduler_kwargs}: {describe_error(error)}; change one of them"
            ) from error

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        return [name for name in super().get_decay_parameter_names(model) if is_decayed(name)]

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor]:
        """The micro-batches of a step, and the numbers of text tokens and image positions it learns, (2,).

        The numbers are sums over all processes.
        """
        batches = list(islice(epoch_iterator, num_batches))
        counts = torch.zeros(2, device=device)
        for batch in batches:
            segments = batch.get("segment_ids", batch.get("attention_mask"))
            learned = count_learned(batch["labels"], plain_model(self.model).vocabulary, segments)
            counts += torch.stack([learned.text_tokens, learned.image_positions]).to(counts)
        return batches, self.accelerator.reduce(counts, "sum")

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, EvoTokLlavaOutput]:
        """The contribution of a micro-batch to the loss of the step.

        The losses are summed over its text tokens and over its image positions, each divided by their number in the
        step.

        Args:
            num_items_in_batch: these numbers from `get_batch_samples`, (2,); without them the micro-batch is the step.
        """
        outputs = model(**inputs, skip_logits=True)
        means = torch.stack([outputs.text_loss, outputs.image_loss]).float()
        counts = torch.stack([outputs.num_text_tokens, outputs.num_image_positions]).to(means)
        in_step = counts if num_items_in_batch is None else torch.as_tensor(num_items_in_batch).to(means)
        weights = means.new_tensor([self.args.text_loss_weight, self.args.image_loss_weight])
        loss = (weights * means * counts / in_step.clamp(min=1)).sum()
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP and DeepSpeed average gradients over processes
        if model.training:
            self._step_losses.append(means.detach())
            self._logged += torch.stack([means.detach() * counts, counts])
        return (loss, outputs) if return_outputs else loss

    def check_step(self) -> None:
        """Check that the losses of the last step are finite.

        Raises:
            UserError: on all processes, if a loss is NaN or infinite on any; nothing of the step is saved.
        """
        losses = torch.stack(self._step_losses)
        self._step_losses = []
        broken = int(not bool(losses.isfinite().all()))
        if on_any_process([broken], self._processes)[0]:
            text, image = losses[~losses.isfinite().all(dim=1)][0].tolist() if broken else ("?", "?")
            raise UserError(
                f"step {self.state.global_step}: the loss is NaN or infinite (text {text}, image {image}"
                f"{'' if broken else ': on another process'}); the last checkpoint is kept. "
                "Check the data and run the same command again, or start over with a lower --learning_rate"
            )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as Trainer does, with losses that are means over all tokens since the last log, or since the start.

        Raises:
            UserError: a log file cannot be written.
        """
        if "loss" in logs:
            logs.update(self.window_metrics())
        if "train_loss" in logs and bool(self._total[1].any()):
            logs["train_loss"] = self.losses_of(self._total)["loss"]
        with writing(self.args.output_dir):
            super().log(logs, *args, **kwargs)

    def window_metrics(self) -> dict[str, float]:
        """Metrics of all processes since the last call, which begins a new window; called on all processes."""
        window = self.accelerator.reduce(self._logged, "sum").double().cpu()
        self._logged, self._total = torch.zeros_like(self._logged), self._total + window
        return self.losses_of(window)

    def describe_length(self, num_steps: int) -> str:
        """Steps, epochs and the global batch size in words."""
        parts = (
            self.args.per_device_train_batch_size,
            self.args.gradient_accumulation_steps,
            self.args.world_size,
        )
        epochs = num_steps * self.args.gradient_accumulation_steps / max(1, len(self.get_train_dataloader()))
        return (
            f"{num_steps} steps ({epochs:.2f} epochs) of {math.prod(parts)} samples "
            "({} per device x {} accumulated x {} processes)".format(*parts)
        )

    def losses_of(self, sums_and_counts: Tensor) -> dict[str, float]:
        """Losses from (2, 2) sums and counts of text tokens and image positions; a mean over nothing is left out."""
        weights, losses = (self.args.text_loss_weight, self.args.image_loss_weight), {"loss": 0.0}
        for name, weight, total, count in zip(
            ("text_loss", "image_loss"), weights, *sums_and_counts.tolist(), strict=True
        ):
            if count:
                losses["loss"] += weight * total / count
                losses[name] = round(total / count, 5)
        return losses

    def sums_and_counts(self, inputs: dict[str, Tensor]) -> Tensor:
        """(2, 2): sums of the text and image losses of a batch, and the numbers of tokens and positions behind them."""
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager(), self.accelerator.autocast():
            outputs = self.model(**inputs)
        means = torch.stack([outputs.text_loss, outputs.image_loss]).float()
        counts = torch.stack([outputs.num_text_tokens, outputs.num_image_positions]).to(means)
        return torch.stack([(means * counts).where(counts > 0, 0.0), counts])

    @property
    def can_draw(self) -> bool:
        """Whether this process has all weights, which drawing needs; not at ZeRO stage 3."""
        return self._shape.zero_stage < 3

    def drawings(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image]:
        """Images for prompts, with the drawing settings of the model."""
        with self.accelerator.autocast():
            processor: Any = self.processing_class
            drawn = plain_model(self.model).generate_images(prompts, processor, seed=list(seeds))
        assert isinstance(drawn, list)
        return drawn

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        sampler = self._order_of(self.train_dataset if train_dataset is None else train_dataset)
        if self.args.world_size == 1 or self.args.dataloader_drop_last:
            return sampler
        return FilledSampler(sampler, self.args.train_batch_size * self.args.world_size)

    def _order_of(self, dataset: Any) -> Sampler:
        """The order of the samples, or of the packed rows, of an epoch."""

        def epoch_of() -> float:
            return self.state.epoch or 0

        if isinstance(dataset, PackedDataset):
            samples = dataset.dataset
            assert isinstance(samples, ConversationDataset)
            packing = PackingSampler(
                cast("Sequence[int]", samples.lengths),
                self.args.model_max_length,
                self.args.seed,
                epoch_of,
                samples.order,
            )
            logger.info("  packed into %d rows per epoch, %.1f %% full", len(packing), 100 * packing.efficiency)
            return packing
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

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Write a checkpoint, mark it as complete, and only then delete the oldest.

        Raises:
            UserError: it cannot be written (a full disk); earlier checkpoints are kept.
        """
        folder = checkpoint_folder(self.args.output_dir, self.state.global_step)
        foreign: set[Path] = set()
        if self._processes.is_first:
            with writing(folder):
                foreign = claim_checkpoint(folder)
        self._processes.barrier()  # no process writes before the first one has listed the existing files
        keep, self.args.save_total_limit = self.args.save_total_limit, None  # Trainer would delete one before
        try:
            super()._save_checkpoint(model, trial)
            finish_checkpoint(folder, self._shape, self._processes, keep, foreign)
        except (OSError, RuntimeError, SafetensorError, UserError) as error:
            if self._processes.is_first:
                delete_checkpoint(folder)
            kept = checkpoints(self.args.output_dir)
            raise UserError(
                f"the checkpoint of step {self.state.global_step} cannot be written: {describe_error(error)}; "
                f"{f'{kept[-1]} is kept' if kept else 'the run has no earlier one'}. "
                "Make room and run the same command again"
            ) from error
        finally:
            self.args.save_total_limit = keep

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write the model folder, or the trained adapter; unlike Trainer, without a pickle of the arguments."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        weights = self.model.state_dict() if state_dict is None else state_dict
        if isinstance(self.model, PeftModel):
            assert self._base is not None
            save_adapter(self.model, folder, weights, self._base)
        else:
            assert self.processing_class is not None
            save_model(self.model, folder, weights)
            save_rows(self.model, folder, weights)
            self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        if isinstance(self.model, PeftModel):
            load_adapter(self.model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            load_rows(self.model, Path(resume_from_checkpoint))


class StepChecks(TrainerCallback):
    """Checks the losses after every step, and saves the last step whatever the saving strategy."""

    def __init__(self, trainer: EvoTokTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # A resumed state has the intervals at which it was saved; those of the command take precedence.
        state.compute_steps(args, state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._trainer.check_step()
        if state.global_step >= state.max_steps:
            control.should_save = True
