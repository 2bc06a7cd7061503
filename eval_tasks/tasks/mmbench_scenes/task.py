"""The task `mmbench_scenes`: questions about scenes with MMBench's columns, prompt layout and option matching."""

from collections.abc import Sequence

import datasets
import numpy as np

from eval_tasks.tasks.mmbench_scenes.option_matching import match_option
from evotok_plugin.data.images import as_picture
from evotok_plugin.scenes.questions import OPTION_LETTERS, mmbench_rows, multiple_choice

# Corpora draw from the streams [seed, 0], [seed, 1], ...: this one is none of theirs, whatever their seed.
_STREAM = 7_002


def _is_absent(value) -> bool:
    """MMBench marks an absent hint or option with None, NaN, "nan" or nothing."""
    return value is None or value != value or str(value).strip().lower() in ("", "nan", "none")


def options(doc: dict) -> dict[str, str]:
    """The options of a document, letter to text."""
    return {letter: str(doc[letter]) for letter in OPTION_LETTERS if not _is_absent(doc.get(letter))}


def process_docs(rows: datasets.Dataset) -> datasets.Dataset:
    """Draw the questions from the task's own row (number of questions, seed, image size)."""
    row = rows[0]
    rng = np.random.default_rng([row["seed"], _STREAM])
    questions = mmbench_rows(row["questions"], rng, row["image_size"])
    columns = {name: [question[name] for question in questions] for name in questions[0]}
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())


def doc_to_visual(doc: dict) -> list:
    return [as_picture(doc["image"])]


def doc_to_text(doc: dict) -> str:
    """Hint (if any), question, lettered options, and the instruction that the model was trained with."""
    hint = "" if _is_absent(doc["hint"]) else f"{doc['hint']}\n"
    return multiple_choice(f"{hint}{doc['question']}", list(options(doc).values()))


def process_results(doc: dict, results: Sequence[str]) -> dict:
    """Hit or miss for the whole and for the category, and what guessing would have got."""
    choices = options(doc)
    hit = float(match_option(results[0], choices) == doc["answer"])
    return {"overall": hit, doc["category"]: hit, "chance": 1 / len(choices)}
