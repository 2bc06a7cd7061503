"""The corpus of drawn scenes on disk: images, captions and training"""

import json
from pathlib import Path

import numpy as np

from evotok_plugin.scenes.captions import captions as captions_of
from evotok_plugin.scenes.records import Pictured, finetune_records, interleaved_records, pretrain_records
from evotok_plugin.scenes.scene import SKILLS, render, sample_scene


def write_corpus(folder: str | Path, num_train: int, num_val: int, seed: int, image_size: int = 48) -> None:
    """Write the corpus that the embedded default trains on.

    `folder/{train,val}/` hold `images/*.png`, `captions.jsonl` (one `{"image", "captions"}` a line) and LLaVA
    JSON: `pretrain.json` (descriptions, read and drawn), `finetune.json` (questions and GenEval prompts) and
    `interleaved.json` (conversations that read and draw).
    """
    for split, count, stream in (("train", num_train, 0), ("val", num_val, 1)):
        rng = np.random.default_rng([seed, stream])
        root = Path(folder) / split
        (root / "images").mkdir(parents=True, exist_ok=True)
        captions, pretrain, finetune, interleaved, before = [], [], [], [], None
        for n in range(count):
            skill = SKILLS[n % len(SKILLS)]
            scene = sample_scene(rng, skill)
            name = f"images/{n:06d}.png"
            render(scene, image_size).save(root / name, compress_level=1)
            captions.append({"image": name, "captions": captions_of(scene, skill, rng)})
            pretrain += pretrain_records(scene, skill, name, rng)
            finetune += finetune_records(scene, skill, name, rng)
            further = np.random.default_rng([seed, stream, n])  # what the others draw does not depend on these
            this = Pictured(scene, skill, name)
            interleaved += interleaved_records(this, before or this, further)
            before = this
        (root / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in captions))
        (root / "pretrain.json").write_text(json.dumps(pretrain))
        (root / "finetune.json").write_text(json.dumps(finetune))
        (root / "interleaved.json").write_text(json.dumps(interleaved))
