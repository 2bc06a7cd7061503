"""Training of small SigLIP teachers on captioned images, for tests and examples.

`python -m evotok_plugin.training.teacher --data FOLDER --tokenizer FOLDER --output_dir FOLDER`
"""

from evotok_plugin.common import command_line

if __name__ == "__main__":
    command_line.exit_without("models")

import argparse
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import (
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
)

from evotok_plugin.common.allocation import keep_freed_memory
from evotok_plugin.common.command_parser import CommandParser, examples_of
from evotok_plugin.common.files import apply_umask_to_weights, check_output_folder, writing
from evotok_plugin.common.foreign_files import describe_error
from evotok_plugin.common.owned_folder import OwnedFolder
from evotok_plugin.common.progress import progress_bar
from evotok_plugin.common.recipes import check_seed, parse_mapping
from evotok_plugin.configuration_evotok import EvoTokConfig
from evotok_plugin.data.images import open_picture
from evotok_plugin.data.sources import FileSource, open_source
from evotok_plugin.data.stream import Augmentation
from evotok_plugin.errors import UserError
from evotok_plugin.image_processing_evotok import EvoTokImageProcessor, as_bytes, to_pixel_values
from evotok_plugin.model_folder import open_tokenizer_folder


def build_siglip(vision: EvoTokConfig, vocab_size: int, max_text_length: int) -> SiglipModel:
    """A SigLIP whose vision tower fits the tokenizer's encoder; it has one more layer, the last, which is not used."""
    width = vision.encoder_hidden_size
    config = SiglipConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=width,
            intermediate_size=vision.encoder_intermediate_size,
            num_hidden_layers=vision.encoder_num_layers + 1,
            num_attention_heads=vision.encoder_num_heads,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
        ).to_dict(),
        text_config=SiglipTextConfig(
            vocab_size=vocab_size,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=max_text_length,
            projection_size=width,
        ).to_dict(),
    )
    model = SiglipModel(config)
    # Initial values of the SigLIP paper (Zhai et al. 2023): temperature 10, bias -10.
    nn.init.constant_(model.logit_scale, math.log(10.0))
    nn.init.constant_(model.logit_bias, -10.0)
    return model


def captioned_images(data: Path) -> list[tuple[Path, str]]:
    """Images and their captions.

    They come from `captions.jsonl` (lines with `image` and `captions`, of which the first is used), otherwise from file
    names: `n01484850_great_white_shark.jpg` shows a "great white shark".

    Raises:
        UserError: neither exists, or `captions.jsonl` is malformed.
    """
    file = data / "captions.jsonl"
    if file.is_file():
        try:
            rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            pairs = [(data / row["image"], str(row["captions"][0])) for row in rows]
        except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
            raise UserError(f"{file}: expected lines with image and captions: {describe_error(error)}") from error
        if not pairs:
            raise UserError(f"{file} is empty; expected lines with image and captions")
        return pairs
    source = open_source(data)
    if not isinstance(source, FileSource):
        raise UserError(f"{data}: expected captions.jsonl, or image files whose names are captions")
    names = [source.key(i) for i in range(len(source))]
    return [(data / name, re.sub(r"^n\d{8}_", "", Path(name).stem).replace("_", " ")) for name in names]


def train_teacher(
    data: Path,
    tokenizer_folder: Path,
    output_dir: Path,
    max_steps: int,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    seed: int = 0,
    vision: EvoTokConfig | None = None,
    augment: bool = False,
    with_text: bool = False,
) -> float:
    """Train contrastively on captioned images and save the vision tower; returns the last loss.

    Args:
        vision: the configuration of the tokenizer that the teacher must fit; by default the tiny preset.
        augment: random scale, crop and flip.
        with_text: also save the text tower and its tokenizer, with which `evotok evaluate` measures zero-shot accuracy.

    Raises:
        UserError: a number is out of range, the captions are missing or malformed, or the loss is not finite.
    """
    for name, value in (("max_steps", max_steps), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")
    if not 0 <= learning_rate < math.inf:
        raise UserError(f"learning_rate must be at least 0, got {learning_rate}")
    check_seed(seed)
    pairs = captioned_images(data)
    tokenizer = open_tokenizer_folder(tokenizer_folder)
    length = max(len(ids) for ids in tokenizer([caption for _, caption in pairs])["input_ids"])
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    vision = vision or EvoTokConfig.preset("tiny")
    processor, crop = EvoTokImageProcessor(size=vision.image_size), Augmentation()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_siglip(vision, len(tokenizer), length)
    model.to(device).train()  # type: ignore[arg-type]  # the decorator of transformers hides `self` from mypy
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.05)
    warmup = max(1, max_steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / max_steps))),
    )
    bar = progress_bar(range(max_steps), desc="teacher", unit="step")
    for _ in bar:
        chosen = [pairs[i] for i in rng.choice(len(pairs), size=min(batch_size, len(pairs)), replace=False)]
        pictures = [open_picture(path) for path, _ in chosen]
        pictures = [crop(p, vision.image_size, rng) if augment else processor.crop(p) for p in pictures]
        captions = [caption for _, caption in chosen]
        text = tokenizer(captions, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        output = model(
            input_ids=text["input_ids"].to(device),
            pixel_values=to_pixel_values(torch.stack([as_bytes(p) for p in pictures]), device),
            return_loss=True,
        )
        if not torch.isfinite(output.loss):
            raise UserError(f"the contrastive loss became {float(output.loss)}; lower --learning_rate")
        output.loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        bar.set_postfix(loss=f"{float(output.loss.detach()):.3f}")
    with writing(output_dir):
        (model if with_text else model.vision_model).save_pretrained(output_dir)
        if with_text:
            tokenizer.save_pretrained(output_dir)
        apply_umask_to_weights(output_dir)
    return float(output.loss.detach())


def main(argv: list[str] | None = None) -> int:
    """Train a teacher; returns the exit code."""
    parser = CommandParser(
        prog="python -m evotok_plugin.training.teacher",
        description="Train a small SigLIP teacher on captioned images.",
        epilog=examples_of(
            "python -m evotok_plugin.training.teacher --data outputs/scenes/train --tokenizer outputs/backbone "
            "--output_dir outputs/teacher"
        ),
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="images with captions.jsonl, or with captions as names"
    )
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a text tokenizer")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the teacher")
    parser.add_argument("--max_steps", type=int, default=300, help="number of training steps")
    parser.add_argument("--batch_size", type=int, default=64, help="images per step")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and of the order of the images")
    parser.add_argument("--augment", action="store_true", help="random scale, crop and flip")
    parser.add_argument(
        "--with_text", action="store_true", help="also save the text tower, for zero-shot accuracy in `evotok evaluate`"
    )
    parser.add_argument(
        "--model", default="{}", help="YAML mapping of tokenizer fields that differ from the tiny preset"
    )
    return command_line.run(parser, argv, _train)


def _train(arguments: argparse.Namespace) -> None:
    vision = EvoTokConfig.preset("tiny", **parse_mapping(arguments.model))
    check_output_folder(arguments.output_dir, "--output_dir")
    OwnedFolder(arguments.output_dir).claim("config.json", "model.safetensors")
    names = ("output_dir", "max_steps", "batch_size", "learning_rate", "seed", "augment", "with_text")
    options = {name: getattr(arguments, name) for name in names}
    keep_freed_memory()
    train_teacher(arguments.data, arguments.tokenizer, vision=vision, **options)


if __name__ == "__main__":
    sys.exit(main())
