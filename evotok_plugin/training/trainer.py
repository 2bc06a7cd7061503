"""Training of the tokenizer: a step, and a run that can be stopped anywhere and resumed exactly."""

import contextlib
import functools
import itertools
import logging
import math
import operator
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Adam
from torch.utils.data import DataLoader

from evotok_plugin.backbone_encoder import BackboneEncoder
from evotok_plugin.common.files import writing
from evotok_plugin.common.interruption import StopSignals, exit_with_parent, stop_on_signals
from evotok_plugin.common.pictures import save_picture
from evotok_plugin.common.processes import Processes
from evotok_plugin.common.progress import progress_bar
from evotok_plugin.common.recipes import as_plain
from evotok_plugin.data.bad_samples import BadSamples
from evotok_plugin.data.sources import Concatenated, open_source, open_sources, split_held_out
from evotok_plugin.data.stream import Augmentation, TrainingStream, collate
from evotok_plugin.errors import UserError
from evotok_plugin.image_processing_evotok import EvoTokImageProcessor, to_pixel_values
from evotok_plugin.metrics.codes import CodeUsage
from evotok_plugin.training.checkpoints import newest_kept, owned_folder
from evotok_plugin.training.config import TokenizerTrainingConfig
from evotok_plugin.training.feature_cache import FeatureCache
from evotok_plugin.training.metrics_file import cut_metrics
from evotok_plugin.training.monitor import LossWatch, Reporter, collapsed_levels
from evotok_plugin.training.objective import TokenizerObjective
from evotok_plugin.training.output import TokenizerOutput, contents_of, fingerprint_of, identity_of
from evotok_plugin.training.reporters import check_reporters
from evotok_plugin.training.run_state import RunState, TrainedDiscriminator
from evotok_plugin.training.starting_model import starting_config, starting_model
from evotok_plugin.training.step_sampler import StepSampler
from evotok_plugin.training.validation import BrokenImages, Validator
from evotok_plugin.training.weights_ema import WeightsEMA

logger = logging.getLogger(__name__)

_KMEANS_BATCH = 64
_STATISTICS_IMAGES = 512  # images to measure the teacher's features on, without k-means


@dataclass(frozen=True)
class StepSummary:
    """A step over all processes: mean figures, and whether any process met broken images or was asked to stop."""

    figures: dict[str, float]
    any_broken: bool
    any_stopped: bool


class TokenizerTrainer:
    """One training run; `open` prepares it, `run` starts or resumes it.

    The constructor reads the data and builds the networks from the random numbers of torch; it changes nothing on disk.

    Raises:
        UserError: the data, the teacher or the settings do not fit.
    """

    def __init__(self, config: TokenizerTrainingConfig, processes: Processes, output: TokenizerOutput) -> None:
        self.config, self.processes, self.device = config, processes, processes.device
        self.folder, self._output = Path(config.output_dir), output
        self._build_data()
        self._build_networks()
        self.step = 0
        self._watch = LossWatch(config.max_loss_growth)
        self._state = RunState(
            folder=self.folder,
            processes=processes,
            seed=config.seed,
            model=self.model,
            optimizer=self.optimizer,
            watch=self._watch,
            weights_ema=self.weights_ema,
            discriminator=self._discriminator,
            heads=self.objective.heads,
        )
        self._validator = Validator(
            self._held_out, config.val_images, self.processor, self.objective.teacher, processes, self._note_broken
        )
        logger.info(
            "%d images to train on, %d held out (%d used in validations)",
            sum(map(len, self._sources)), len(self._held_out), len(self._validator),
        )  # fmt: skip
        self._usage = self._new_usage()
        self._reporter: Reporter | None = None
        self._signals = StopSignals()

    @classmethod
    def open(cls, config: TokenizerTrainingConfig) -> "TokenizerTrainer":
        """Join the processes that torchrun started, check the output folder, seed, and build the trainer.

        Raises:
            UserError: the output folder cannot be used, or the data, the teacher or the settings do not fit.
        """
        processes = Processes.join()
        check_reporters(config.reporters)
        if config.batch_size % processes.world_size:
            raise UserError(f"batch_size {config.batch_size} cannot be split over {processes.world_size} processes")
        if config.bf16 and processes.device.type == "cpu":
            logger.warning("bf16 on a CPU is often far slower than float32; --bf16 false turns it off")
        output = TokenizerOutput.open(Path(config.output_dir), config, processes)
        torch.manual_seed(config.seed)
        try:
            return cls(config, processes, output)
        except BaseException:
            output.close()
            raise

    # Setup ---------------------------------------------------------------------------------------------------

    def _build_data(self) -> None:
        config = self.config
        sources, held_out = [open_source(spec) for spec in config.data], []
        self._num_images = sum(map(len, sources))
        if config.val_data:
            held_out = [open_sources(config.val_data)]
        else:
            parts = [split_held_out(source, config.val_fraction) for source in sources]
            sources, held_out = [training for training, _ in parts], [held for _, held in parts]
        self._sources, self._held_out = sources, Concatenated(held_out)
        model_config = starting_config(config)
        self.processor = EvoTokImageProcessor(size=model_config.image_size)
        self.stream = TrainingStream(
            sources,
            model_config.image_size,
            Augmentation() if config.augment else None,
            config.seed,
            length=config.max_steps * config.batch_size,
            weights=config.data_weights,
        )
        report = self.folder / "bad_images.jsonl" if self.processes.is_first else None
        self._bad = BadSamples(report, config.max_bad_fraction)

    def _build_networks(self) -> None:
        config = self.config
        self.model = starting_model(config)
        # Without a teacher, a semantic decoder no longer fits an encoder and codebooks that train.
        had_semantics = config.train_parts != "all" and self.model.config.semantic_decoder_trained
        self.model.to(self.device).train()  # type: ignore[arg-type]  # transformers' decorator hides `self` from mypy
        self.objective = TokenizerObjective(config, self.model)
        if config.feature_cache:
            if self.objective.teacher is not None:
                self.objective.teacher.remember = FeatureCache()
            if isinstance(self.model.encoder, BackboneEncoder):
                self.model.encoder.backbone.remember = FeatureCache()
        if config.freeze_encoder:
            self.model.encoder.requires_grad_(False)
        self.model.config.semantic_decoder_trained = had_semantics or self.objective.teacher is not None
        if self.objective.teacher is None:
            self.model.semantic_decoder.requires_grad_(False)  # it gets no gradient
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        if config.compile:
            for network in (self.model.encoder, self.model.pixel_decoder, self.model.semantic_decoder):
                network.compile()
            self.objective.compile()
        self.weights_ema = WeightsEMA(self.model, config.weights_ema) if config.weights_ema else None
        self.network = self._on_all_processes(self.model)
        heads = self.objective.heads
        self._heads_network = self._on_all_processes(heads) if heads is not None else None
        self._trained = [self.model, *([heads] if heads is not None else [])]
        self.optimizer = self._adam(*self._trained)
        self._discriminator: TrainedDiscriminator | None = None
        if self.objective.discriminator is not None:
            discriminator = self.objective.discriminator
            self._discriminator_network = self._on_all_processes(discriminator)
            self._discriminator = TrainedDiscriminator(discriminator, self._adam(discriminator))

    def _on_all_processes(self, network: nn.Module) -> nn.Module:
        if self.processes.world_size == 1:
            return network
        devices = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(network, device_ids=devices, broadcast_buffers=False)

    def _adam(self, *networks: nn.Module) -> Adam:
        trained = [weight for network in networks for weight in network.parameters() if weight.requires_grad]
        fused = self.device.type == "cuda"
        return Adam(trained, lr=self.config.learning_rate, betas=(0.9, 0.95), fused=fused)

    def _new_usage(self) -> CodeUsage:
        return CodeUsage(self.model.config.num_quantizers, self.model.config.codebook_size)

    # A step --------------------------------------------------------------------------------------------------

    def _autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.config.bf16)

    def _set_learning_rate(self) -> None:
        config = self.config
        factor = min(1.0, (self.step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
        if config.cosine_decay:
            factor *= 0.5 * (1 + math.cos(math.pi * self.step / config.max_steps))
        optimizers = [self.optimizer] + ([self._discriminator.optimizer] if self._discriminator else [])
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * factor

    def train_step(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """One optimizer step on images (B, 3, H, W) in [-1, 1].

        Returns this process's weighted loss terms and the norm of the gradients, on the device: nothing here waits for
        them. NaN and infinite values are detected after the step, before anything is written.
        """
        self._set_learning_rate()
        with self._autocast():
            output = self.network(pixel_values, self.objective.depths)
            terms = self.objective.terms(pixel_values, output, self.step, self._heads_network)
        functools.reduce(operator.add, terms.values()).backward()
        norm = self._update(self.optimizer, *self._trained)
        if self._discriminator is not None and self.objective.is_active(self.step):
            with self._autocast():
                terms["discriminator"] = self.objective.discriminator_term(
                    self._discriminator_network, pixel_values, output.pixels
                )
            terms["discriminator"].backward()
            self._update(self._discriminator.optimizer, self._discriminator.model)
        self._usage.update(output.codes)
        return {name: value.detach().float() for name, value in terms.items()} | {"gradient_norm": norm}

    def _update(self, optimizer: Adam, *networks: nn.Module) -> Tensor:
        weights = itertools.chain.from_iterable(network.parameters() for network in networks)
        norm = nn.utils.clip_grad_norm_(weights, self.config.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm.detach().float()

    def summarize(self, terms: dict[str, Tensor], num_broken: int) -> StepSummary:
        """Combine the step of all processes in one exchange, the only wait of a step."""
        events = torch.tensor([float(num_broken), float(self._signals.caught > 0)], device=self.device)
        shares = torch.stack(list(terms.values())) / self.processes.world_size
        values = self.processes.add_up(torch.cat([shares, events])).tolist()
        return StepSummary(dict(zip(terms, values[:-2], strict=True)), values[-2] > 0, values[-1] > 0)

    def _check(self, figures: dict[str, float]) -> None:
        """Stop on a loss that is NaN or infinite or has exploded."""
        try:
            self._watch.check(figures)
        except UserError as error:
            raise UserError(
                f"step {self.step}: {error}; training stops, {newest_kept(self.folder)}. "
                "Lower --learning_rate, or check the data"
            ) from None

    def _note_broken(self, broken: BrokenImages) -> None:
        """Record the broken images of all processes, and stop if there are too many."""
        for images in self.processes.gather(broken):
            for name, reason in images:
                self._bad.add(name, reason)
        self._bad.check(self._num_images)

    # The run -------------------------------------------------------------------------------------------------

    @stop_on_signals()
    def run(self) -> Path:
        """Train to `max_steps`, from the newest checkpoint if there is one; returns the model folder.

        Ctrl-C, SIGTERM and SIGHUP save a checkpoint and end the process with 128 + the signal's number.

        Raises:
            UserError: a loss is not finite or has exploded, too many images are broken, or a file cannot be written.
        """
        with contextlib.closing(self._output):
            return self._run()

    def _run(self) -> Path:
        teacher = fingerprint_of(self.objective.teacher)
        if self.objective.teacher is not None and self.config.teacher_standardize:
            self.objective.teacher.fit_statistics(self._first_images(self.config.kmeans_images or _STATISTICS_IMAGES))
        self._output.begin(contents_of(self._sources), data=identity_of(self._sources), teacher=teacher)
        try:
            resumed_at = self._state.restore()
            if resumed_at is None:
                self._init_codebooks()
            self.step = resumed_at or 0
            if self.processes.is_first:
                cut_metrics(self.folder, resumed_at)
                self._reporter = Reporter(self.folder, self.config.reporters, as_plain(self.config), self.step)
            with self._signals:
                self._train()
        except BaseException:
            if self._reporter is not None:
                self._reporter.close()  # before its files are moved
            self._output.restore()
            raise
        if self.processes.is_first:
            with self._averaged(), writing(self.folder):
                self.model.save_pretrained(self.folder)
                self.processor.save_pretrained(self.folder)
                if self.objective.teacher is not None:
                    self.objective.teacher.record(self.folder)
        if self._reporter is not None:
            self._reporter.close()
        self.processes.barrier()
        return self.folder

    def _train(self) -> None:
        config = self.config
        bar = progress_bar(
            total=config.max_steps,
            initial=self.step,
            desc="tokenizer",
            unit="step",
            disable=not self.processes.is_first,
        )
        started, num_images = time.monotonic(), 0
        for pixels, broken in self._batches():
            terms = self.train_step(to_pixel_values(pixels, self.device))
            summary = self.summarize(terms, len(broken))
            figures = summary.figures
            self._check(figures)
            if summary.any_broken:
                self._note_broken(broken)
            self.step += 1
            self._output.finish_replacing()
            if self.weights_ema is not None:
                self.weights_ema.update(self.step)
            num_images += config.batch_size
            bar.update()
            is_last = self.step == config.max_steps
            if self.step % config.log_every == 0 or is_last:
                loss = sum(value for name, value in figures.items() if name not in ("gradient_norm", "discriminator"))
                rate = round(num_images / (time.monotonic() - started), 1)
                bar.set_postfix({name: f"{value:.4f}" for name, value in figures.items()} | {"img/s": f"{rate:.1f}"})
                self._log({"loss": loss, **figures, "images_per_second": rate})
            if self.step % config.val_every == 0 or is_last:
                self._log(self.validate())
                self._warn_of_collapse()
            if self.step % config.save_every == 0 or is_last or summary.any_stopped:
                self.save_checkpoint()
            if summary.any_stopped and not is_last:
                self._end_early()
        bar.close()

    def _end_early(self) -> None:
        logger.warning("stopped at step %d, which is saved; run the same command to resume", self.step)
        self.processes.barrier()
        raise SystemExit(128 + (self._signals.caught or signal.SIGTERM))

    def _batches(self) -> DataLoader:
        """This process's share of the stream, from the current step to the end."""
        return DataLoader(
            self.stream,
            batch_sampler=StepSampler(self.step, self.config.max_steps, self.config.batch_size, self.processes),
            num_workers=self.config.num_workers,
            collate_fn=collate,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=exit_with_parent,
            # A separate generator: starting a loader must not advance the random numbers that a checkpoint holds.
            generator=torch.Generator(),
        )

    @torch.no_grad()
    def _init_codebooks(self) -> None:
        """Initialize the codebooks by k-means on the latents of the first images.

        Every process uses the same images and random numbers, so that all get the same codebooks.
        """
        if self.config.init_from is not None:
            return
        latents, encoder = [], self.model.encoder
        if isinstance(encoder, BackboneEncoder) and self.config.init_encoder:
            encoder.init_from_images(self._first_images(self.config.kmeans_images), self.config.semantic_share)
        for pixel_values in self._first_images(self.config.kmeans_images):
            with self._autocast():
                latents.append(self.model.encoder(pixel_values).float())
        if latents:
            self.model.quantizer.init_from(torch.cat(latents))

    def _first_images(self, count: int) -> Iterator[Tensor]:
        """The first `count` images of the stream in batches (B, 3, H, W), the same in every process."""
        count = min(count, len(self.stream))
        for start in range(0, count, _KMEANS_BATCH):
            pixels, _ = collate([self.stream[i] for i in range(start, min(start + _KMEANS_BATCH, count))])
            yield to_pixel_values(pixels, self.device)

    def _averaged(self) -> contextlib.AbstractContextManager:
        """Context in which the model has the weights that will be saved: the average, if the run keeps one."""
        return self.weights_ema.applied() if self.weights_ema is not None else contextlib.nullcontext()

    def validate(self) -> dict[str, float]:
        """Figures on held-out images; also writes a picture of originals over reconstructions.

        Raises:
            UserError: none of the images can be read, or too many are broken.
        """
        with self._averaged():
            validation = self._validator.run(self.model, self._autocast)
        if validation.picture is not None:
            path = self.folder / f"validation_{self.step:07d}.png"
            owned_folder(self.folder).claim(path.name)
            save_picture(validation.picture, path)
            if self._reporter is not None:
                self._reporter.picture(self.step, "validation", validation.picture)
        return validation.figures

    def _warn_of_collapse(self) -> None:
        """Log the levels that have used few of their codes since the last validation, and reset the counts."""
        self._usage.add_up(self.processes)
        if self.processes.is_first:
            for line in collapsed_levels(self._usage, self.config.min_code_usage):
                logger.warning("step %d: %s", self.step, line)
        self._usage = self._new_usage()

    def _log(self, values: dict[str, float]) -> None:
        if values and self._reporter is not None:
            self._reporter.figures(self.step, values)

    def save_checkpoint(self) -> None:
        """Save everything that an exact resumption needs.

        Raises:
            UserError: the checkpoint cannot be written; earlier ones are kept.
        """
        self._state.save(self.step, self.config.keep_checkpoints)
