"""The embedded SigLIP teacher: a small SigLIP trained on the scenes and their captions.

`python -m evotok_plugin.training.teacher --data FOLDER --tokenizer FOLDER --output_dir FOLDER`
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from evotok_plugin.configuration_evotok import EvoTokConfig
from evotok_plugin.data.folder import as_bytes, open_picture, to_pixel_values
from evotok_plugin.progress import progress_interval


def load_teacher(folder: str) -> PreTrainedModel:
    """The frozen vision tower of any SigLIP folder or hub id.

    Raises:
        ValueError: it cannot be loaded.
    """
    try:
        teacher = SiglipVisionModel.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"teacher {folder!r} cannot be loaded ({error}); "
            "give a SigLIP folder, for the paper's recipe a download of google/siglip2-large-patch16-256, "
            "or train without (--semantic_weight 0)"
        ) from error
    return teacher.eval().requires_grad_(False)


def teacher_features(teacher: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """The semantic target (B, N, D): output of the last layer but one."""
    with torch.no_grad():
        return teacher(pixel_values, output_hidden_states=True).hidden_states[-2]


def build_siglip(vision: EvoTokConfig, vocab_size: int, max_text_length: int) -> SiglipModel:
    """A SigLIP whose vision tower fits the tokenizer's encoder, with one layer more (the last one is not used)."""
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
    # The paper's start (Zhai et al. 2023): temperature 10, bias -10.
    nn.init.constant_(model.logit_scale, math.log(10.0))
    nn.init.constant_(model.logit_bias, -10.0)
    return model


def train_teacher(
    data: Path,
    tokenizer_folder: Path,
    output_dir: Path,
    max_steps: int,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> float:
    """Train contrastively on `data/captions.jsonl` and save the vision tower; returns the last loss.

    Raises:
        ValueError: no captions, or a loss that is not finite.
    """
    file = data / "captions.jsonl"
    if not file.is_file():
        raise ValueError(f"{file} does not exist; the teacher needs lines of {{'image', 'captions'}}")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    length = max(len(ids) for ids in tokenizer([row["captions"][0] for row in rows])["input_ids"])
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    vision = EvoTokConfig.preset("tiny")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_siglip(vision, len(tokenizer), length).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.05)
    warmup = max(1, max_steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / max_steps))),
    )
    bar = tqdm(range(max_steps), desc="teacher", unit="step", mininterval=progress_interval())
    for _ in bar:
        chosen = [rows[i] for i in rng.choice(len(rows), size=min(batch_size, len(rows)), replace=False)]
        pictures = torch.stack([as_bytes(open_picture(data / row["image"])) for row in chosen])
        # The first caption is the full description: what it says is what the features must hold.
        captions = [row["captions"][0] for row in chosen]
        text = tokenizer(captions, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        output = model(
            input_ids=text["input_ids"].to(device),
            pixel_values=to_pixel_values(pictures, device),
            return_loss=True,
        )
        if not torch.isfinite(output.loss):
            raise ValueError(f"the contrastive loss became {float(output.loss)}; lower --learning_rate")
        output.loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        bar.set_postfix(loss=f"{float(output.loss.detach()):.3f}")
    model.vision_model.save_pretrained(output_dir)
    return float(output.loss.detach())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with captions.jsonl and images/")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a text tokenizer")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--max_steps", type=int, default=300)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = vars(parser.parse_args(argv))
    try:
        train_teacher(arguments.pop("data"), arguments.pop("tokenizer"), **arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
