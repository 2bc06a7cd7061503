"""The task `geneval_scenes`: GenEval's six skills on scenes of colored shapes, judged by the exact detector.

A document is one prompt; the model answers with `{"text": "", "images": [path, ...]}` as JSON, one path per image.
"""

import json
import logging
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from eval_tasks.judging.answers import open_image, parse_images
from eval_tasks.judging.rules import evaluate, overall_score
from eval_tasks.judging.scene_detector import SceneDetector
from evotok_plugin.common.files import write_text, writing
from evotok_plugin.errors import UserError
from evotok_plugin.scenes.captions import scene_prompts

logger = logging.getLogger(__name__)

# Corpora use the random streams [seed, 0], [seed, 1], ...; this stream differs from all of them.
_STREAM = 7_001


# Documents -----------------------------------------------------------------------------------------------------


def derangement(prompts: Sequence[str], rng: np.random.Generator) -> list[int]:
    """Assign to every document another one with a different prompt, each exactly once.

    Raises:
        UserError: more than half of the prompts are equal, so no such assignment exists.
    """
    groups: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(index)
    largest = max(map(len, groups.values()), default=0)
    if 2 * largest > len(prompts):
        raise UserError(f"one prompt occurs {largest} times among {len(prompts)}: too few others to be its partners")
    # Equal prompts are adjacent; shifting by the longest run of them pairs no prompt with itself.
    names = list(groups)
    ring = [index for position in rng.permutation(len(names)) for index in groups[names[position]]]
    partner = [0] * len(ring)
    for position, index in enumerate(ring):
        partner[index] = ring[(position + largest) % len(ring)]
    return partner


def make_documents(skills: Sequence[dict], seed: int) -> list[dict]:
    """The documents of the task, with skills alternating so that a limit covers all.

    A skill with fewer distinct prompts than requested repeats them; each document gets its own images.

    Args:
        skills: rows `{"skill": name, "prompts": number}`.
        seed: of the prompts and of the baseline's partners.
    """
    rng = np.random.default_rng([seed, _STREAM])
    by_skill = []
    for row in skills:
        different = scene_prompts(row["skill"], row["prompts"], rng)
        by_skill.append([different[n % len(different)] for n in range(row["prompts"])])
    longest = max(map(len, by_skill))
    records = [records[n] for n in range(longest) for records in by_skill if n < len(records)]
    partners = derangement([record["prompt"] for record in records], rng)
    # Clauses mix types ("position": ["left of", 0]), which columns cannot hold: they travel as JSON.
    return [
        {
            "index": index,
            "tag": record["tag"],
            "prompt": record["prompt"],
            "record": json.dumps(record),
            "baseline_record": json.dumps(records[partner]),
        }
        for index, (record, partner) in enumerate(zip(records, partners, strict=True))
    ]


def process_docs(rows: datasets.Dataset) -> datasets.Dataset:
    """Generate the prompts from the rows of skills.jsonl (skill, number of prompts, seed)."""
    return datasets.Dataset.from_list(make_documents(list(rows), rows[0]["seed"]))


# Scoring -------------------------------------------------------------------------------------------------------


@cache
def judge() -> SceneDetector:
    """The detector, created once."""
    return SceneDetector()


def judge_image(path: Path, record: dict, baseline_record: dict) -> dict:
    """Judge an image against its own record and against that of another prompt."""
    image, detector = open_image(path), judge()
    instances = detector.detect(image)
    own = evaluate(record, instances, detector.rules)
    other = evaluate(baseline_record, instances, detector.rules)
    return {
        "image": str(path),
        "tag": record["tag"],
        "prompt": record["prompt"],
        "correct": own.correct,
        "reason": own.reason,
        "instances": [instance.as_dict() for instance in instances],
        "baseline_tag": baseline_record["tag"],
        "baseline_prompt": baseline_record["prompt"],
        "baseline_correct": other.correct,
    }


def process_results(doc: dict, results: Sequence[str]) -> dict:
    """Score a document: the metric of its skill, and the judgements for the two overall metrics."""
    record, baseline_record = json.loads(doc["record"]), json.loads(doc["baseline_record"])
    judgements = [judge_image(path, record, baseline_record) for path in parse_images(results[0])]
    for judgement in judgements:
        judgement["index"] = doc["index"]
    judged_as_other = [(judgement["baseline_tag"], float(judgement["baseline_correct"])) for judgement in judgements]
    score = float(np.mean([judgement["correct"] for judgement in judgements]))
    return {
        "overall": {"score": score, "judgements": judgements},
        "baseline": {"score": float(np.mean([value for _, value in judged_as_other])), "scored": judged_as_other},
        record["tag"]: score,
    }


def write_judgements(judgements: Sequence[dict], folder: Path, task: str) -> Path:
    """Write one JSON line per judgement to `folder/judgements/<time>_<task>.jsonl`."""
    path = folder / "judgements" / f"{time.strftime('%Y%m%d_%H%M%S')}_{task}.jsonl"
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    ordered = sorted(judgements, key=lambda judgement: judgement["index"])
    write_text(path, "".join(json.dumps(judgement) + "\n" for judgement in ordered))
    return path


def aggregate_overall(items: Sequence[dict], args: Any = None) -> float:
    """The mean of the task scores; with an output folder, also write the judgements next to the results."""
    judgements = [judgement for item in items for judgement in item["judgements"]]
    folder = getattr(args, "output_path", None)
    if folder:
        logger.info("judgements: %s", write_judgements(judgements, Path(folder), "geneval_scenes"))
    return overall_score([(judgement["tag"], float(judgement["correct"])) for judgement in judgements])


def aggregate_baseline(items: Sequence[dict]) -> float:
    """The same score when images are judged by other prompts: that of a model that ignores its prompt."""
    return overall_score([tuple(scored) for item in items for scored in item["scored"]])
