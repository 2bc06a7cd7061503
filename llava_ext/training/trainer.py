"""Hugging Face's Trainer with both losses apart, one progress bar, and a JSONL log."""

import json
import math
import time
from collections import defaultdict
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from evotok_plugin.progress import progress_interval
from llava_ext.data.dataset import ModalityGroupedSampler
from llava_ext.training.checkpoints import CompletionMarker


class EvoTokTrainer(Trainer):
    """Trains an `EvoTokLlavaForConditionalGeneration` on a `ConversationDataset`."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        # DeepSpeed casts all parameters to the training dtype, the frozen ones too: what is saved are these.
        rounds = self.args.bf16 or self.args.fp16
        tower = self.model.vision_tower.state_dict() if rounds else {}
        self._exact_tower = {f"vision_tower.{name}": value.cpu().clone() for name, value in tower.items()}
        self._loss_sums: dict[str, list[float]] = defaultdict(list)
        for default in (ProgressCallback, PrinterCallback):
            self.remove_callback(default)
        self.add_callback(ProgressBar())
        self.add_callback(MetricsFile())
        self.add_callback(CompletionMarker())

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = model(**inputs)
        if not math.isfinite(float(outputs.loss.detach())):
            raise FloatingPointError(
                f"step {self.state.global_step}: the loss is {float(outputs.loss)} (text {float(outputs.text_loss)}, "
                f"image {float(outputs.image_loss)}); the last checkpoint is kept. "
                "Lower --learning_rate or check the data"
            )
        labels, vocabulary = inputs["labels"], self.accelerator.unwrap_model(model).vocabulary
        learned_image = vocabulary.is_residual(labels)
        # A batch without one of the two tasks says nothing about that task's loss.
        if bool(learned_image.any()):
            self._loss_sums["image_loss"].append(float(outputs.image_loss.detach()))
        if bool(((labels != -100) & ~learned_image).any()):
            self._loss_sums["text_loss"].append(float(outputs.text_loss.detach()))
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs:
            for name in ("text_loss", "image_loss"):  # the same reductions on every rank
                values = self._loss_sums[name]
                total = torch.tensor([sum(values), len(values)], dtype=torch.float32, device=self.args.device)
                total = self.accelerator.reduce(total, "sum")
                if total[1]:
                    logs[name] = round(float(total[0] / total[1]), 5)
            self._loss_sums.clear()
        super().log(logs, *args, **kwargs)

    def _get_train_sampler(self, train_dataset=None):
        if not self.args.group_by_modality_length:
            return super()._get_train_sampler(train_dataset)
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        return ModalityGroupedSampler(
            kinds=[record.kind for record in dataset.records],
            batch_size=self.args.per_device_train_batch_size,
            seed=self.args.seed,
            epoch_of=lambda: self.state.epoch or 0,
        )

    def _save(self, output_dir=None, state_dict=None) -> None:
        if self._exact_tower:
            state_dict = {**(self.model.state_dict() if state_dict is None else state_dict), **self._exact_tower}
        super()._save(output_dir, state_dict)
        # A pickle of the arguments, which nothing of ours reads: recipe.yaml holds them as text.
        (Path(output_dir or self.args.output_dir) / "training_args.bin").unlink(missing_ok=True)


class ProgressBar(TrainerCallback):
    """One bar: steps, speed, time left, the newest losses."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero and not args.disable_tqdm:
            self._bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                unit="step",
                dynamic_ncols=True,
                mininterval=progress_interval(),
            )

    def on_step_end(self, args, state, control, **kwargs):
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self._bar is not None and logs:
            shown = {k: f"{logs[k]:.4f}" for k in ("loss", "text_loss", "image_loss") if k in logs}
            if shown:
                self._bar.set_postfix(shown)

    def on_train_end(self, args, state, control, **kwargs):
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class MetricsFile(TrainerCallback):
    """Appends every log entry to `metrics.jsonl` in the output folder, with step and time."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs:
            line = {"step": state.global_step, "time": round(time.time(), 2), **logs}
            with (Path(args.output_dir) / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
