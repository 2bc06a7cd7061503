"""Training of the tokenizer: losses, two optimizers, validation, checkpoints that resume exactly."""

import contextlib
import json
import logging
import math
import os
import shutil
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from evotok_plugin.configuration_evotok import EvoTokConfig
from evotok_plugin.data.folder import (
    Augmentation,
    ImageStream,
    is_held_out,
    list_images,
    open_picture,
    to_pixel_values,
    usable_images,
)
from evotok_plugin.image_processing_evotok import EvoTokImageProcessor
from evotok_plugin.losses.adversarial import (
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
)
from evotok_plugin.losses.perceptual import load_lpips
from evotok_plugin.losses.semantic import cosine_loss, folded_cosine_loss
from evotok_plugin.metrics.codes import CodeUsage
from evotok_plugin.metrics.image import psnr
from evotok_plugin.modeling_evotok import EvoTokModel
from evotok_plugin.pictures import image_grid
from evotok_plugin.progress import progress_interval
from evotok_plugin.recipes import save_resolved
from evotok_plugin.training.config import TokenizerTrainingConfig
from evotok_plugin.training.teacher import load_teacher, teacher_features

logger = logging.getLogger(__name__)

_CHECKPOINT = "checkpoint"


class TokenizerTrainer:
    """One training run; `run()` starts it or goes on with it."""

    def __init__(self, config: TokenizerTrainingConfig) -> None:
        self.config = config
        self.rank, self.world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        use_cuda = torch.cuda.is_available()
        if self.world_size > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if use_cuda else "gloo")
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if use_cuda else torch.device("cpu")
        if config.batch_size % self.world_size:
            raise ValueError(f"batch_size {config.batch_size} cannot be split over {self.world_size} processes")
        self.folder = Path(config.output_dir)
        self._prepare_folder()
        torch.manual_seed(config.seed)
        self._build_data()
        self._build_networks()
        self.step = 0
        self._writer = None

    # Setting up ----------------------------------------------------------------------------------------------

    def _prepare_folder(self) -> None:
        if self.rank == 0:
            if self.config.overwrite:
                shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True, exist_ok=True)
            save_resolved(self.config, self.folder / "recipe.yaml")
        self._barrier()

    def _barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def _build_data(self) -> None:
        config, root = self.config, Path(self.config.data)
        report = self.folder / "bad_images.jsonl" if self.rank == 0 else None
        images = usable_images(list_images(root), config.max_bad_fraction, report)
        held_out = [path for path in images if is_held_out(path, root, config.val_fraction)]
        training = [path for path in images if not is_held_out(path, root, config.val_fraction)]
        if not training:
            raise ValueError(f"no training images are left in {root} after holding out {len(held_out)}")
        model_config = EvoTokConfig.preset(config.preset, **config.model)
        self.processor = EvoTokImageProcessor(size=model_config.image_size)
        self.stream = ImageStream(
            training,
            model_config.image_size,
            Augmentation() if config.augment else None,
            config.seed,
            length=config.max_steps * config.batch_size,
        )
        self.held_out = held_out[: config.val_images]
        logger.info(
            "%d images to train on, %d held out (%d looked at)", len(training), len(held_out), len(self.held_out)
        )

    def _build_networks(self) -> None:
        config = self.config
        self.model = EvoTokModel(EvoTokConfig.preset(config.preset, **config.model)).to(self.device).train()
        self.teacher = load_teacher(config.teacher).to(self.device) if config.semantic_weight > 0 else None
        if self.teacher is not None:
            self._check_teacher()
            if config.init_encoder:
                self._start_from_teacher()
        self.lpips = load_lpips().to(self.device) if config.lpips_weight > 0 else None
        wrap = DistributedDataParallel if self.world_size > 1 else lambda module, **kwargs: module
        self.network = wrap(self.model, broadcast_buffers=False)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95))
        self.discriminator, self.discriminator_optimizer = None, None
        if config.gan_weight > 0:
            self.discriminator = wrap(PatchDiscriminator().to(self.device))
            self.discriminator_optimizer = torch.optim.Adam(
                self.discriminator.parameters(), lr=config.learning_rate, betas=(0.9, 0.95)
            )

    def _check_teacher(self) -> None:
        theirs, ours = self.teacher.config, self.model.config
        facts = {
            "image_size": (theirs.image_size, ours.image_size),
            "patch_size": (theirs.patch_size, ours.patch_size),
            "width (semantic_dim)": (theirs.hidden_size, ours.semantic_dim),
        }
        for name, (given, expected) in facts.items():
            if given != expected:
                raise ValueError(f"teacher {self.config.teacher}: {name} is {given}, the preset needs {expected}")

    def _start_from_teacher(self) -> None:
        """The encoder begins as the teacher's own tower, as in the paper."""
        encoder, tower = self.model.encoder, self.teacher
        needed = len(encoder.encoder.layers)
        if len(tower.encoder.layers) < needed:
            raise ValueError(f"the teacher has {len(tower.encoder.layers)} layers, the encoder needs {needed}")
        encoder.embeddings.load_state_dict(tower.embeddings.state_dict())
        for ours, theirs in zip(encoder.encoder.layers, tower.encoder.layers, strict=False):
            ours.load_state_dict(theirs.state_dict())

    # A step --------------------------------------------------------------------------------------------------

    def _autocast(self):
        if not self.config.bf16:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def _losses(self, pixel_values: Tensor, pixels: Tensor, features: Tensor, commitment: Tensor) -> dict[str, Tensor]:
        """The weighted terms of the tokenizer's loss, by name."""
        config, terms = self.config, {}
        distance = F.mse_loss if config.pixel_loss == "l2" else F.l1_loss
        terms["pixel"] = config.pixel_weight * distance(pixels.float(), pixel_values)
        terms["commitment"] = config.commitment_weight * commitment
        if self.lpips is not None:
            terms["lpips"] = config.lpips_weight * self.lpips(pixels.float(), pixel_values).mean()
        if self.teacher is not None:
            target = teacher_features(self.teacher, pixel_values)
            terms["semantic"] = config.semantic_weight * (
                cosine_loss(features, target) + folded_cosine_loss(features, target)
            )
        if self.discriminator is not None and self.step >= config.gan_start:
            adversarial = generator_loss(self.discriminator(pixels.float()))
            weight = config.gan_weight
            if config.gan_adaptive:
                last_layer = self.model.pixel_decoder.last_layer
                weight = weight * adaptive_weight(terms["pixel"] + terms.get("lpips", 0), adversarial, last_layer)
            terms["gan"] = weight * adversarial
        return terms

    def _check_finite(self, terms: dict[str, Tensor]) -> None:
        for name, value in terms.items():
            if not math.isfinite(value := float(value.detach())):
                raise ValueError(
                    f"step {self.step}: the {name} loss is {value}; training stops, the last checkpoint in "
                    f"{self.folder / _CHECKPOINT} is kept. Lower --learning_rate, or check the data"
                )

    def _set_learning_rate(self) -> None:
        config = self.config
        factor = min(1.0, (self.step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
        if config.cosine_decay:
            factor *= 0.5 * (1 + math.cos(math.pi * self.step / config.max_steps))
        for optimizer in filter(None, (self.optimizer, self.discriminator_optimizer)):
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * factor

    def train_step(self, pixel_values: Tensor) -> dict[str, float]:
        """One optimizer step on images (B, 3, H, W) in [-1, 1]; returns the weighted loss terms."""
        self._set_learning_rate()
        with self._autocast():
            output = self.network(pixel_values)
            terms = self._losses(pixel_values, output.pixels, output.features, output.commitment_loss)
        self._check_finite(terms)
        sum(terms.values()).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.discriminator is not None and self.step >= self.config.gan_start:
            self.discriminator_optimizer.zero_grad(set_to_none=True)  # the generator's pass left gradients here
            with self._autocast():
                real, fake = self.discriminator(pixel_values), self.discriminator(output.pixels.detach().float())
                terms["discriminator"] = discriminator_loss(real, fake)
            self._check_finite(terms)
            terms["discriminator"].backward()
            nn.utils.clip_grad_norm_(self.discriminator.parameters(), self.config.grad_clip)
            self.discriminator_optimizer.step()
            self.discriminator_optimizer.zero_grad(set_to_none=True)
        return {name: float(value.detach()) for name, value in terms.items()}

    # The run -------------------------------------------------------------------------------------------------

    def run(self) -> Path:
        """Train to `max_steps`, going on from the last checkpoint if there is one; returns the model folder."""
        resumed = self._load_checkpoint()
        if not resumed:
            self._init_codebooks()
        first = self.step
        bar = tqdm(
            total=self.config.max_steps,
            initial=first,
            desc="tokenizer",
            unit="step",
            disable=self.rank > 0,
            mininterval=progress_interval(),
        )
        started, seen = time.monotonic(), 0
        for batch in self._batches():
            terms = self.train_step(to_pixel_values(batch, self.device))
            self.step += 1
            seen += batch.shape[0] * self.world_size
            bar.update()
            if self.step % self.config.log_every == 0 or self.step == self.config.max_steps:
                rate = seen / (time.monotonic() - started)
                bar.set_postfix({name: f"{value:.4f}" for name, value in terms.items()} | {"img/s": f"{rate:.0f}"})
                self._log({"loss": sum(terms.values()), **terms, "images_per_second": round(rate, 1)})
            if self.step % self.config.val_every == 0 or self.step == self.config.max_steps:
                self._log(self.validate())
            if self.step % self.config.save_every == 0 or self.step == self.config.max_steps:
                self.save_checkpoint()
        bar.close()
        if self.rank == 0:
            self.model.save_pretrained(self.folder)
            self.processor.save_pretrained(self.folder)
        self._barrier()
        return self.folder

    def _batches(self) -> DataLoader:
        """This rank's share of the stream, from the present step to the end."""
        share = self.config.batch_size // self.world_size
        start, stop = self.step * self.config.batch_size, self.config.max_steps * self.config.batch_size
        positions = [
            first + self.rank * share + i for first in range(start, stop, self.config.batch_size) for i in range(share)
        ]
        # A generator of its own: starting a loader must not advance the random numbers that a checkpoint holds.
        return DataLoader(
            self.stream,
            batch_size=share,
            sampler=positions,
            num_workers=self.config.num_workers,
            generator=torch.Generator(),
        )

    @torch.no_grad()
    def _init_codebooks(self) -> None:
        if not self.config.kmeans_images:
            return
        count = min(self.config.kmeans_images, len(self.stream))
        latents = []
        for start in range(0, count, 64):
            batch = torch.stack([self.stream[i] for i in range(start, min(start + 64, count))])
            latents.append(self.model.encoder(to_pixel_values(batch, self.device)))
        # The same images and the same random numbers on every rank: the same codebooks.
        self.model.quantizer.init_from(torch.cat(latents))

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """PSNR, semantic cosine and code usage on held-out images; writes a picture of originals over
        reconstructions."""
        if not self.held_out or self.rank:
            return {}
        self.model.eval()
        usage = CodeUsage(self.model.config.num_quantizers, self.model.config.codebook_size)
        scores, cosines, shown = [], [], None
        for start in range(0, len(self.held_out), 64):
            pictures = [open_picture(path) for path in self.held_out[start : start + 64]]
            pixel_values = self.processor(pictures).pixel_values.to(self.device)
            output = self.model(pixel_values)
            scores += psnr(output.pixels, pixel_values).tolist()
            usage.update(output.codes)
            if self.teacher is not None:
                cosines.append(1 - float(cosine_loss(output.features, teacher_features(self.teacher, pixel_values))))
            shown = shown or (pixel_values[:8], output.pixels[:8])
        self.model.train()
        originals, rebuilt = (EvoTokImageProcessor.to_pil(part) for part in shown)
        image_grid(originals + rebuilt, columns=len(originals)).save(self.folder / f"validation_{self.step:07d}.png")
        result = {"val_psnr": sum(scores) / len(scores)}
        if cosines:
            result["val_semantic_cosine"] = sum(cosines) / len(cosines)
        share = usage.usage()
        return result | {"val_code_usage_first": share[0], "val_code_usage_last": share[-1]}

    def _log(self, values: dict[str, float]) -> None:
        if self.rank or not values:
            return
        line = {"step": self.step, "time": round(time.time(), 2)} | {k: round(v, 6) for k, v in values.items()}
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.folder / "tensorboard"))
        for name, value in values.items():
            self._writer.add_scalar(name, value, self.step)

    # Checkpoints ---------------------------------------------------------------------------------------------

    def save_checkpoint(self) -> None:
        """Everything a run needs to go on exactly, as safetensors, replaced in one move."""
        if self.rank == 0:
            tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
            tensors |= {f"quantizer.{k}": v for k, v in self.model.quantizer.learning_state().items()}
            tensors |= _optimizer_tensors("optimizer", self.optimizer)
            if self.discriminator is not None:
                tensors |= {f"discriminator.{k}": v for k, v in _plain(self.discriminator).state_dict().items()}
                tensors |= _optimizer_tensors("discriminator_optimizer", self.discriminator_optimizer)
            tensors["rng"] = torch.get_rng_state()
            tensors["step"] = torch.tensor(self.step)
            temporary = self.folder / f"{_CHECKPOINT}.tmp"
            save_file({name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}, temporary)
            os.replace(temporary, self.folder / f"{_CHECKPOINT}.safetensors")
        self._barrier()

    def _load_checkpoint(self) -> bool:
        path = self.folder / f"{_CHECKPOINT}.safetensors"
        if not path.is_file():
            return False
        tensors = load_file(path)

        def part(prefix: str) -> dict[str, Tensor]:
            return {k[len(prefix) + 1 :]: v for k, v in tensors.items() if k.startswith(prefix + ".")}

        try:
            self.model.load_state_dict(part("model"))
        except RuntimeError as error:
            raise ValueError(
                f"{path} is a checkpoint of another model ({error}); pass --overwrite true to begin anew"
            ) from error
        self.model.quantizer.load_learning_state(part("quantizer"))
        _load_optimizer(self.optimizer, part("optimizer"))
        if self.discriminator is not None:
            _plain(self.discriminator).load_state_dict(part("discriminator"))
            _load_optimizer(self.discriminator_optimizer, part("discriminator_optimizer"))
        torch.set_rng_state(tensors["rng"])
        self.step = int(tensors["step"])
        logger.info("going on from step %d of %s", self.step, path)
        return True


def _plain(module: nn.Module) -> nn.Module:
    return module.module if isinstance(module, DistributedDataParallel) else module


def _optimizer_tensors(prefix: str, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Adam's state as named tensors: `prefix.<parameter index>.<name>`."""
    state = optimizer.state_dict()["state"]
    return {
        f"{prefix}.{index}.{name}": torch.as_tensor(value) for index, s in state.items() for name, value in s.items()
    }


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
