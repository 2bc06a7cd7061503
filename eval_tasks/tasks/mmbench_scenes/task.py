"""The task `mmbench_scenes`: questions about scenes with MMBench's columns, prompt layout and option matching."""

from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np

from eval_tasks.tasks.mmbench_scenes.option_matching import match_option
from evotok_plugin.data.images import as_picture
from evotok_plugin.scenes.questions import OPTION_LETTERS, mmbench_rows, multiple_choice

# Corpora use the random streams [seed, 0], [seed, 1], ...; this stream differs from all of them.
_STREAM = 7_002


def _is_absent(value: Any) -> bool:
    """Whether a hint or option is absent, for which MMBench writes None, NaN, "nan" or nothing."""
    return value is None or value != value or str(value).strip().lower() in ("", "nan", "none")


def options(doc: dict) -> dict[str, str]:
    """The options of a document: text by letter."""
    return {letter: str(doc[letter]) for letter in OPTION_LETTERS if not _is_absent(doc.get(letter))}


def process_docs(rows: datasets.Dataset) -> datasets.Dataset:
    """Generate the questions from the row of questions.jsonl (number of questions, seed, image size)."""
    row = rows[0]
    rng = np.random.default_rng([row["seed"], _STREAM])
    questions = mmbench_rows(row["questions"], rng, row["image_size"])
    columns = {name: [question[name] for question in questions] for name in questions[0]}
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())


def doc_to_visual(doc: dict) -> list:
    return [as_picture(doc["image"])]


def doc_to_text(doc: dict) -> str:
    """The hint (if any), the question, the lettered options, and the instruction that the model was trained with."""
    hint = "" if _is_absent(doc["hint"]) else f"{doc['hint']}\n"
    return multiple_choice(f"{hint}{doc['question']}", list(options(doc).values()))


def process_results(doc: dict, results: Sequence[str]) -> dict:
    """1 or 0 for the overall metric and that of the category, and the expected score of guessing."""
    choices = options(doc)
    hit = float(match_option(results[0], choices) == doc["answer"])
    return {"overall": hit, doc["category"]: hit, "chance": 1 / len(choices)}
