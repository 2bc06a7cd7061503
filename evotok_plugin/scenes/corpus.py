"""The scene corpus on disk: images, captions, LLaVA records and drawing prompts."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from evotok_plugin.scenes.captions import description, prompt_record, rich_prompt, scene_captions
from evotok_plugin.scenes.other_topics import other_topic_records
from evotok_plugin.scenes.records import (
    SceneImage,
    finetune_records,
    interleaved_records,
    mixed_records,
    places_records,
    pretrain_records,
    question_records,
    relation_records,
    single_records,
)
from evotok_plugin.scenes.scene import SKILLS, Scene, render, sample_mixed_scene, sample_scene

MIXED = 3  # mixed scenes after every scene of each skill
QUESTIONS = 6  # per scene
_HELD_OUT_EVERY = 5  # one of so many prompts is only in `val/prompts.jsonl`
_FEW_PROMPTS = ("single_object", "colors", "counting")  # skills with too few prompts to hold some out
DETAILED = "detailed"  # the tag of prompts with more detail than a skill requires


def write_corpus(folder: str | Path, num_train: int, num_val: int, seed: int, image_size: int = 48) -> None:
    """Write the corpus that the embedded default model trains on.

    `folder/train/` and `folder/val/` contain `images/*.png`, `captions.jsonl` (one `{"image", "captions"}` per line)
    and LLaVA records: `pretrain.json` (descriptions, read and drawn), `single.json` (drawings of single objects),
    `finetune.json` (GenEval prompts, drawn and written), `questions.json`, `relations.json` (more questions about two
    objects), `places.json` (lists of all objects and their places), `mixed.json` (scenes of several different objects,
    described and drawn), `interleaved.json` (conversations that read and draw) and `other.json` (text outside the
    domain). `prompts.jsonl` has drawing prompts with the skill as their tag; those of `val` do not
    occur in `train`, except those of skills with few prompts.
    """
    for split, count, stream in (("train", num_train, 0), ("val", num_val, 1)):
        root = Path(folder) / split
        (root / "images").mkdir(parents=True, exist_ok=True)
        # Kinds of records that were added later draw from streams of their own, which leaves all others as they were.
        rng, places_rng, relations_rng = (np.random.default_rng([seed, stream, *more]) for more in ((), (1,), (2,)))
        captions: list[dict] = []
        records: dict[str, list[dict]] = {
            name: []
            for name in (
                "pretrain", "single", "finetune", "questions", "places", "relations", "mixed", "interleaved"
            )
        }  # fmt: skip
        scenes: list[tuple[Scene, str]] = []
        previous: SceneImage | None = None
        for n in range(count):
            name = f"images/{n:06d}.png"
            kind = n % (len(SKILLS) + MIXED)
            if kind >= len(SKILLS):
                scene = sample_mixed_scene(rng)
                captions.append({"image": name, "captions": [description(scene)]})
                records["mixed"] += mixed_records(scene, name)
            else:
                skill = SKILLS[kind]
                scene = sample_scene(rng, skill)
                captions.append({"image": name, "captions": scene_captions(scene, skill, rng)})
                records["pretrain"] += pretrain_records(scene, skill, name, rng)
                records["finetune"] += finetune_records(scene, skill, name, rng)
                this = SceneImage(scene, skill, name)
                records["interleaved"] += interleaved_records(this, previous or this, rng)
                scenes.append((scene, skill))
                previous = this
            records["single"] += single_records(scene, name)
            records["places"] += places_records(scene, name, places_rng)
            records["relations"] += relation_records(scene, name, relations_rng)
            records["questions"] += question_records(scene, name, QUESTIONS, rng)
            render(scene, image_size).save(root / name, compress_level=1)
        _write_lines(root / "captions.jsonl", captions)
        for file, rows in records.items():
            (root / f"{file}.json").write_text(json.dumps(rows))
        (root / "other.json").write_text(json.dumps(other_topic_records(max(1, count // 4), seed, split)))
        _write_lines(root / "prompts.jsonl", prompt_rows(scenes, split, rng))


def prompt_rows(scenes: Sequence[tuple[Scene, str]], split: str, rng: np.random.Generator) -> list[dict]:
    """Distinct drawing prompts of scenes with their skills, as rows `{"prompt", "tag"}`.

    Each scene gives the plain prompt of its skill and a detailed one, with the tag `detailed`. A prompt belongs to one
    split, decided by its text, unless its skill has few prompts.
    """
    rows: dict[str, dict] = {}
    for scene, skill in scenes:
        plain, detailed = prompt_record(scene, skill)["prompt"], rich_prompt(scene, skill, rng)
        if len(scene.objects) == 1:  # often a plain prompt of the skill "colors"
            detailed = f"a photo of {description(scene)}"
        for prompt, tag in ((plain, skill), (detailed, DETAILED)):
            if tag in _FEW_PROMPTS or is_held_out(prompt) == (split == "val"):
                rows.setdefault(prompt, {"prompt": prompt, "tag": tag})
    return list(rows.values())


def is_held_out(prompt: str) -> bool:
    """Whether a prompt belongs to the held-out ones, by a hash of its text."""
    return hashlib.sha256(prompt.encode()).digest()[0] % _HELD_OUT_EVERY == 0


def _write_lines(path: Path, rows: Sequence[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
