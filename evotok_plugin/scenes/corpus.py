"""The scene corpus on disk: images, captions and LLaVA records."""

import json
from pathlib import Path

import numpy as np

from evotok_plugin.scenes.captions import scene_captions
from evotok_plugin.scenes.records import SceneImage, finetune_records, interleaved_records, pretrain_records
from evotok_plugin.scenes.scene import SKILLS, render, sample_scene


def write_corpus(folder: str | Path, num_train: int, num_val: int, seed: int, image_size: int = 48) -> None:
    """Write the corpus that the embedded default model trains on.

    `folder/train/` and `folder/val/` contain `images/*.png`, `captions.jsonl` (one `{"image", "captions"}` per line)
    and LLaVA records: `pretrain.json` (descriptions, read and drawn), `finetune.json` (questions and GenEval prompts)
    and `interleaved.json` (conversations that read and draw).
    """
    for split, count, stream in (("train", num_train, 0), ("val", num_val, 1)):
        rng = np.random.default_rng([seed, stream])
        root = Path(folder) / split
        (root / "images").mkdir(parents=True, exist_ok=True)
        captions: list[dict] = []
        pretrain: list[dict] = []
        finetune: list[dict] = []
        interleaved: list[dict] = []
        previous: SceneImage | None = None
        for n in range(count):
            skill = SKILLS[n % len(SKILLS)]
            scene = sample_scene(rng, skill)
            name = f"images/{n:06d}.png"
            render(scene, image_size).save(root / name, compress_level=1)
            captions.append({"image": name, "captions": scene_captions(scene, skill, rng)})
            pretrain += pretrain_records(scene, skill, name, rng)
            finetune += finetune_records(scene, skill, name, rng)
            separate = np.random.default_rng([seed, stream, n])  # leaves the sequence of `rng` unchanged
            this = SceneImage(scene, skill, name)
            interleaved += interleaved_records(this, previous or this, separate)
            previous = this
        (root / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in captions))
        (root / "pretrain.json").write_text(json.dumps(pretrain))
        (root / "finetune.json").write_text(json.dumps(finetune))
        (root / "interleaved.json").write_text(json.dumps(interleaved))
