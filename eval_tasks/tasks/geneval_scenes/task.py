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

from eval_tasks.judging import drawn_with
from eval_tasks.judging.answers import open_image, parse_images
from eval_tasks.judging.drawn_run import new_folder, store_drawn_run
from eval_tasks.judging.judge_run import judge_run
from eval_tasks.judging.options import JudgeOptions
from eval_tasks.judging.rules import evaluate, overall_score
from eval_tasks.judging.scene_detector import SceneDetector
from eval_tasks.tasks.benchmarks import GENEVAL_SCENES
from eval_tasks.tasks.geneval.task import SCENES
from eval_tasks.tasks.geneval_scenes.prompts import make_documents
from evotok_plugin.common.files import write_text, writing
from evotok_plugin.errors import UserError

logger = logging.getLogger(__name__)

# Documents -----------------------------------------------------------------------------------------------------


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
        "overall": {"score": score, "judgements": judgements, "document": dict(doc), "answer": results[0]},
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
    """The mean of the task scores; with an output folder, also write the judgements and a contact sheet there."""
    judgements = [judgement for item in items for judgement in item["judgements"]]
    folder = getattr(args, "output_path", None)
    if folder:
        logger.info("judgements: %s", write_judgements(judgements, Path(folder), "geneval_scenes"))
        _write_contact_sheet(items, Path(folder), args)
    return overall_score([(judgement["tag"], float(judgement["correct"])) for judgement in judgements])


def _write_contact_sheet(items: Sequence[dict], output: Path, args: Any) -> None:
    """Store the images below `output/drawn` with a report, as the other drawing tasks do.

    The score is known by then, so a report that cannot be written is logged and does not end the run.
    """
    answers = [(item["document"], item["answer"]) for item in items]
    try:
        folder = new_folder(output / "drawn", GENEVAL_SCENES.name)
        run = store_drawn_run(folder, GENEVAL_SCENES.name, answers, about=drawn_with.of_command_line(args))
        judge_run(run, GENEVAL_SCENES, JudgeOptions(detector=SCENES))
    except UserError as error:
        logger.error("geneval_scenes: no contact sheet: %s", error)
        return
    logger.info("contact sheet: %s", folder / "contact_sheet.html")


def aggregate_baseline(items: Sequence[dict]) -> float:
    """The same score when images are judged by other prompts: that of a model that ignores its prompt."""
    return overall_score([tuple(scored) for item in items for scored in item["scored"]])
