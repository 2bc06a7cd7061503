"""Training of the tokenizer: a step, validation, and a run that can be stopped anywhere and resumed exactly."""

import contextlib
import logging
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from evotok_plugin.common.files import writing
from evotok_plugin.common.interruption import StopSignals, exit_with_parent
from evotok_plugin.common.pictures import image_grid
from evotok_plugin.common.processes import Processes
from evotok_plugin.common.progress import progress_bar
from evotok_plugin.common.recipes import as_plain
from evotok_plugin.configuration_evotok import EvoTokConfig
from evotok_plugin.data.bad_samples import BadSamples
from evotok_plugin.data.batches import decoded
from evotok_plugin.data.sources import Concatenated, open_source, open_sources, split_held_out
from evotok_plugin.data.stream import Augmentation, TrainingStream, collate
from evotok_plugin.errors import UserError
from evotok_plugin.image_processing_evotok import EvoTokImageProcessor, to_pixel_values
from evotok_plugin.losses.semantic import cosine_loss
from evotok_plugin.metrics.codes import CodeUsage
from evotok_plugin.metrics.image import psnr
from evotok_plugin.model_folder import load_strictly
from evotok_plugin.modeling_evotok import EvoTokModel
from evotok_plugin.teacher import teacher_features
from evotok_plugin.training.checkpoints import (
    load_optimizer,
    newest_kept,
    optimizer_tensors,
    owned_folder,
    part,
    read_newest,
    under,
    write_checkpoint,
)
from evotok_plugin.training.config import TokenizerTrainingConfig
from evotok_plugin.training.monitor import LossWatch, Reporter, collapsed_levels
from evotok_plugin.training.objective import TokenizerObjective
from evotok_plugin.training.output import TokenizerOutput, contents_of, fingerprint_of, identity_of
from evotok_plugin.training.reporters import check_reporters
from evotok_plugin.training.weights_ema import WeightsEMA

logger = logging.getLogger(__name__)

_VALIDATION_BATCH = 64
_SHOWN = 8  # images in a validation picture


class TokenizerTrainer:
    """One training run; `run()` starts or resumes it.

    Raises:
        UserError: data, teacher or settings that do not fit.
    """

    def __init__(self, config: TokenizerTrainingConfig) -> None:
        self.config, self.processes = config, Processes.join()
        self.rank, self.world_size, self.device = (
            self.processes.rank,
            self.processes.world_size,
            self.processes.device,
        )
        check_reporters(config.reporters)
        if config.batch_size % self.world_size:
            raise UserError(f"batch_size {config.batch_size} cannot be split over {self.world_size} processes")
        if config.bf16 and self.device.type == "cpu":
            logger.warning("bf16 on a CPU is often far slower than float32; --bf16 false turns it off")
        self.folder = Path(config.output_dir)
        self._output = TokenizerOutput(self.folder, config, self.processes)
        torch.manual_seed(config.seed)
        self._build_data()
        self._build_networks()
        self.step = 0
        self._watch = LossWatch(config.max_loss_growth)
        self._usage = self._new_usage()
        self._reporter: Reporter | None = None
        self._signals = StopSignals()

    # Setting up ----------------------------------------------------------------------------------------------

    def _build_data(self) -> None:
        config = self.config
        sources, held_out = [open_source(spec) for spec in config.data], []
        self._num_images = sum(map(len, sources))
        if config.val_data:
            held_out = [open_sources(config.val_data)]
        else:
            parts = [split_held_out(source, config.val_fraction) for source in sources]
            sources, held_out = [training for training, _ in parts], [held for _, held in parts]
        self._held_out = Concatenated(held_out)
        count = min(config.val_images, len(self._held_out))
        # Spread evenly: sources in ImageNet's layout are sorted by class.
        self._looked_at = np.linspace(0, len(self._held_out) - 1, count).round().astype(int) if count else []
        self._sources = sources
        model_config = EvoTokConfig.preset(config.preset, **config.model)
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
        logger.info(
            "%d images to train on, %d held out (%d looked at)", sum(map(len, sources)), len(self._held_out), count
        )

    def _build_networks(self) -> None:
        config = self.config
        self.model = EvoTokModel(EvoTokConfig.preset(config.preset, **config.model)).to(self.device).train()
        self.objective = TokenizerObjective(config, self.model)
        self.model.config.semantic_decoder_trained = self.objective.teacher is not None
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
        self.optimizer = self._adam(self.model)
        self._judge, self.discriminator_optimizer = None, None
        if self.objective.discriminator is not None:
            self._judge = self._on_all_processes(self.objective.discriminator)
            self.discriminator_optimizer = self._adam(self.objective.discriminator)

    def _on_all_processes(self, network: nn.Module) -> nn.Module:
        if self.world_size == 1:
            return network
        devices = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(network, device_ids=devices, broadcast_buffers=False)

    def _adam(self, network: nn.Module) -> torch.optim.Adam:
        learning = [weight for weight in network.parameters() if weight.requires_grad]
        fused = self.device.type == "cuda"
        return torch.optim.Adam(learning, lr=self.config.learning_rate, betas=(0.9, 0.95), fused=fused)

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
        for optimizer in filter(None, (self.optimizer, self.discriminator_optimizer)):
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * factor

    def train_step(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """One optimizer step on images (B, 3, H, W) in [-1, 1].

        Returns this process's weighted loss terms and the gradients' norm, still on the device: nothing here waits for
        it. Whether they are numbers is looked at when they arrive, after the step; what is on disk is still good.
        """
        self._set_learning_rate()
        with self._autocast():
            output = self.network(pixel_values)
            terms = self.objective.terms(pixel_values, output, self.step)
        sum(terms.values()).backward()
        norm = self._update(self.optimizer, self.model)
        if self.objective.is_active(self.step):
            with self._autocast():
                terms["discriminator"] = self.objective.discriminator_term(self._judge, pixel_values, output.pixels)
            terms["discriminator"].backward()
            self._update(self.discriminator_optimizer, self.objective.discriminator)
        self._usage.update(output.codes)
        return {name: value.detach().float() for name, value in terms.items()} | {"gradient_norm": norm}

    def _update(self, optimizer: torch.optim.Optimizer, network: nn.Module) -> Tensor:
        norm = nn.utils.clip_grad_norm_(network.parameters(), self.config.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm.detach().float()

    def _agree(self, terms: dict[str, Tensor], num_broken: int) -> tuple[dict[str, float], bool]:
        """The step's figures as means over all processes, and whether any of them was told to stop or met broken
        images; one exchange, the only wait in a step."""
        told = torch.tensor([float(num_broken), float(self._signals.caught > 0)], device=self.device)
        values = self.processes.add_up(torch.cat([torch.stack(list(terms.values())) / self.world_size, told])).tolist()
        self._anyone_broken, anyone_stops = values[-2] > 0, values[-1] > 0
        return dict(zip(terms, values[:-2], strict=True)), anyone_stops

    def _check(self, figures: dict[str, float]) -> None:
        """Stop on a loss that is NaN or infinite or has exploded."""
        try:
            self._watch.check(figures)
        except ValueError as error:
            raise UserError(
                f"step {self.step}: {error}; training stops, {newest_kept(self.folder)}. "
                "Lower --learning_rate, or check the data"
            ) from None

    def _note_broken(self, broken: list[tuple[str, str]]) -> None:
        """Name the broken images that any process has met."""
        for part_of_them in self.processes.gather(broken):
            for name, reason in part_of_them:
                self._bad.add(name, reason)
        self._bad.check(self._num_images)

    # The run -------------------------------------------------------------------------------------------------

    def run(self) -> Path:
        """Train to `max_steps`, from the last checkpoint if there is one; returns the model folder.

        Ctrl-C and SIGTERM save a checkpoint and end the process with 128 + the signal's number.

        Raises:
            UserError: a loss that is not finite or has exploded, too many broken images, a failed write.
        """
        teacher = fingerprint_of(self.objective.teacher)
        self._output.begin(contents_of(self._sources), data=identity_of(self._sources), teacher=teacher)
        try:
            if not self._load_checkpoint():
                self._init_codebooks()
            if self.processes.is_first:
                self._reporter = Reporter(self.folder, self.config.reporters, as_plain(self.config))
            with self._signals:
                self._train()
        except BaseException:
            self._output.restore()
            raise
        if self.processes.is_first:
            with self._averaged(), writing(self.folder):
                self.model.save_pretrained(self.folder)
                self.processor.save_pretrained(self.folder)
            self._reporter.close()
        self.processes.barrier()
        return self.folder

    def _train(self) -> None:
        config = self.config
        bar = progress_bar(
            total=config.max_steps, initial=self.step, desc="tokenizer", unit="step", disable=self.rank > 0
        )
        started, seen = time.monotonic(), 0
        for pixels, broken in self._batches():
            terms = self.train_step(to_pixel_values(pixels, self.device))
            figures, stop = self._agree(terms, len(broken))
            self._check(figures)
            if self._anyone_broken:
                self._note_broken(broken)
            self.step += 1
            self._output.finish_replacing()
            if self.weights_ema is not None:
                self.weights_ema.update(self.step)
            seen += config.batch_size
            bar.update()
            last = self.step == config.max_steps
            if self.step % config.log_every == 0 or last:
                loss = sum(value for name, value in figures.items() if name not in ("gradient_norm", "discriminator"))
                rate = round(seen / (time.monotonic() - started), 1)
                bar.set_postfix({name: f"{value:.4f}" for name, value in figures.items()} | {"img/s": f"{rate:.1f}"})
                self._log({"loss": loss, **figures, "images_per_second": rate})
            if self.step % config.val_every == 0 or last:
                self._log(self.validate())
                self._warn_of_collapse()
            if self.step % config.save_every == 0 or last or stop:
                self.save_checkpoint()
            if stop and not last:
                self._end_early()
        bar.close()

    def _end_early(self) -> None:
        logger.warning("stopped at step %d, which is saved; run the same command to resume", self.step)
        self.processes.barrier()
        raise SystemExit(128 + (self._signals.caught or signal.SIGTERM))

    def _batches(self) -> DataLoader:
        """This process's share of the stream, from the present step to the end."""
        return DataLoader(
            self.stream,
            batch_sampler=_Positions(self.step, self.config.max_steps, self.config.batch_size, self.processes),
            num_workers=self.config.num_workers,
            collate_fn=collate,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=exit_with_parent,
            # A generator of its own: starting a loader must not advance the random numbers that a checkpoint holds.
            generator=torch.Generator(),
        )

    @torch.no_grad()
    def _init_codebooks(self) -> None:
        """k-means on the latents of the first images: the same images and random numbers in every process, so the same
        codebooks."""
        count = min(self.config.kmeans_images, len(self.stream))
        latents = []
        for start in range(0, count, _VALIDATION_BATCH):
            pixels, _ = collate([self.stream[i] for i in range(start, min(start + _VALIDATION_BATCH, count))])
            with self._autocast():
                latents.append(self.model.encoder(to_pixel_values(pixels, self.device)).float())
        if latents:
            self.model.quantizer.init_from(torch.cat(latents))

    # Validation ----------------------------------------------------------------------------------------------

    def _averaged(self) -> contextlib.AbstractContextManager:
        """The weights that will be saved: averaged ones where they are kept."""
        return self.weights_ema.applied() if self.weights_ema is not None else contextlib.nullcontext()

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """PSNR, semantic cosine and code usage on held-out images, which the processes share; writes a picture of
        originals over reconstructions."""
        if not len(self._looked_at):
            return {}
        usage, sums, broken, shown = self._new_usage(), torch.zeros(3, dtype=torch.float64), [], None
        self.model.eval()
        with self._averaged():
            for pixel_values in self._validation_batches(broken):
                with self._autocast():
                    output = self.model(pixel_values)
                usage.update(output.codes)
                sums[0] += psnr(output.pixels, pixel_values).sum().cpu()
                sums[1] += len(pixel_values) * self._cosine(output.features, pixel_values)
                sums[2] += len(pixel_values)
                shown = shown or (pixel_values[:_SHOWN], output.pixels[:_SHOWN])
        self.model.train()
        self.processes.add_up(sums)
        usage.all_reduce()
        self._note_broken(broken)
        if self.processes.is_first and shown:
            self._show(*shown)
        total_psnr, total_cosine, count = sums.tolist()
        if not count:
            raise UserError(f"none of the {len(self._looked_at)} images to validate on can be read")
        result = {"val_psnr": total_psnr / count}
        if self.objective.teacher is not None:
            result["val_semantic_cosine"] = total_cosine / count
        share = usage.usage()
        return result | {"val_code_usage_first": share[0], "val_code_usage_last": share[-1]}

    def _validation_batches(self, broken: list[tuple[str, str]]) -> Iterator[Tensor]:
        """This process's share of the held-out images as pixel values; the names of broken ones are put down."""
        own = self._looked_at[self.rank :: self.world_size]
        for batch in decoded(self._held_out, own, self.processor, _VALIDATION_BATCH):
            broken += [(self._held_out.key(index), reason) for index, reason in batch.broken.items()]
            if batch.indices:
                yield batch.pixel_values.to(self.device)

    def _cosine(self, features: Tensor, pixel_values: Tensor) -> float:
        """Mean cosine to the teacher; 0 where there is none."""
        if self.objective.teacher is None:
            return 0.0
        with self._autocast():
            target = teacher_features(self.objective.teacher, pixel_values)
        return 1 - float(cosine_loss(features, target))

    def _show(self, pixel_values: Tensor, pixels: Tensor) -> None:
        originals, rebuilt = (EvoTokImageProcessor.to_pil(images) for images in (pixel_values, pixels))
        picture = image_grid(originals + rebuilt, columns=len(originals))
        name = f"validation_{self.step:07d}.png"
        with writing(self.folder / name):
            owned_folder(self.folder).claim(name)
            picture.save(self.folder / name)
        if self._reporter is not None:
            self._reporter.picture(self.step, "validation", picture)

    def _warn_of_collapse(self) -> None:
        """Say which levels have used few of their codes since the last validation, and count anew."""
        self._usage.all_reduce()
        if self.processes.is_first:
            for line in collapsed_levels(self._usage, self.config.min_code_usage):
                logger.warning("step %d: %s", self.step, line)
        self._usage = self._new_usage()

    def _log(self, values: dict[str, float]) -> None:
        if values and self._reporter is not None:
            self._reporter.figures(self.step, values)

    # Checkpoints ---------------------------------------------------------------------------------------------

    def save_checkpoint(self) -> None:
        """Save everything that an exact resumption needs.

        Raises:
            UserError: it cannot be written; the one before it stays.
        """
        states = self.processes.gather(self._random_state())
        failure = None
        if self.processes.is_first:
            tensors = under("model", self.model.state_dict())
            tensors |= under("quantizer", self.model.quantizer.learning_state())
            tensors |= under("optimizer", optimizer_tensors(self.optimizer))
            tensors |= under("watch", self._watch.state_dict())
            if self.weights_ema is not None:
                tensors |= under("weights_ema", self.weights_ema.state_dict())
            if self.objective.discriminator is not None:
                tensors |= under("discriminator", self.objective.discriminator.state_dict())
                tensors |= under("discriminator_optimizer", optimizer_tensors(self.discriminator_optimizer))
            for rank, state in enumerate(states):
                tensors |= under(f"random.{rank}", state)
            tensors["step"] = torch.tensor(self.step)
            try:
                write_checkpoint(self.folder, self.step, tensors, self.config.keep_checkpoints)
            except ValueError as error:
                failure = str(error)
        if failure := self.processes.gather(failure)[0]:
            raise UserError(failure)

    def _random_state(self) -> dict[str, Tensor]:
        state = {"cpu": torch.get_rng_state()}
        return state | {"cuda": torch.cuda.get_rng_state(self.device)} if self.device.type == "cuda" else state

    def _load_checkpoint(self) -> bool:
        found = read_newest(self.folder)
        if found is None:
            return False
        path, tensors = found
        remedy = "restore it, or pass --overwrite true to start over"
        load_strictly(self.model, part("model", tensors), str(path), remedy)
        self.model.quantizer.load_learning_state(part("quantizer", tensors))
        load_optimizer(self.optimizer, part("optimizer", tensors))
        self._watch.load_state_dict(part("watch", tensors))
        if self.weights_ema is not None:
            averages = part("weights_ema", tensors)
            if not averages:
                raise UserError(
                    f"{path} was written without weights_ema; leave it out, or pass --overwrite true to start over"
                )
            self.weights_ema.load_state_dict(averages)
        if self.objective.discriminator is not None:
            load_strictly(self.objective.discriminator, part("discriminator", tensors), str(path), remedy)
            load_optimizer(self.discriminator_optimizer, part("discriminator_optimizer", tensors))
        self._load_random_state(part(f"random.{self.rank}", tensors))
        self.step = int(tensors["step"])
        logger.info("going on from step %d of %s", self.step, path)
        return True

    def _load_random_state(self, state: dict[str, Tensor]) -> None:
        if not state:  # more processes than before: data and codebooks go on alike, only level dropout draws anew
            torch.manual_seed(self.config.seed + self.rank)
            return
        torch.set_rng_state(state["cpu"])
        if "cuda" in state and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], self.device)


class _Positions:
    """Positions of the stream that one process takes, a list a step."""

    def __init__(self, first_step: int, last_step: int, batch_size: int, processes: Processes) -> None:
        self._steps, self._batch_size = range(first_step, last_step), batch_size
        self._share = batch_size // processes.world_size
        self._offset = processes.rank * self._share

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self._steps:
            first = step * self._batch_size + self._offset
            yield list(range(first, first + self._share))
