"""A drawing benchmark as an lmms-eval task whose images are stored and judged together.

lmms-eval scores one document at a time, but judges work in batches and only after the drawing model has been freed.
Therefore `process_results` only passes the answers on, and the aggregation of the overall score, which lmms-eval calls
first, stores and judges the images of all documents.
"""

import json
import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from eval_tasks.judging import drawn_with
from eval_tasks.judging.drawn_run import new_folder, store_drawn_run
from eval_tasks.judging.judge_run import Benchmark, judge_run
from eval_tasks.judging.options import JudgeOptions
from eval_tasks.judging.scores import OVERALL, Score
from evotok_plugin.errors import UserError

logger = logging.getLogger(__name__)

_INTERVAL = {f"{OVERALL}_low": "low", f"{OVERALL}_high": "high"}
_DEFAULT_FOLDER = "outputs/lmms_eval"  # without --output_path


def doc_to_visual(doc: dict) -> list:
    """No images: a drawing prompt consists of text."""
    return []


def doc_to_target(doc: dict) -> str:
    """The complete document as JSON: the only part of a document in lmms-eval's samples, and needed to judge them."""
    return json.dumps(doc)


class JudgedTask:
    """The functions of a task's YAML: `process_docs`, `process_results` and the aggregation of each metric.

    Args:
        benchmark: the benchmark and its judge.
        documents: returns the documents, each with `index` and `prompt`; called once.
        skills: returns the metrics that a document counts for.
    """

    def __init__(
        self, benchmark: Benchmark, documents: Callable[[], list[dict]], skills: Callable[[dict], Sequence[str]]
    ) -> None:
        self.benchmark, self._load, self._skills = benchmark, documents, skills
        self._documents: list[dict] | None = None
        self._marks: dict[str, dict[str, list[float]]] = {}  # marks by skill, by key of the answer
        self._scores: dict[str, Score] = {}

    # Before drawing ------------------------------------------------------------------------------------------

    def prepare(self) -> dict:
        """Load the documents, and return the judges' options, which are recorded in the results.

        Raises:
            UserError: missing prompts, or an invalid option.
        """
        options = JudgeOptions.from_environment()
        if self._documents is None:
            self._documents = self._load()
        return options.as_dict()

    def before_drawing(self, generation_kwargs: Mapping[str, Any] | None = None) -> None:
        """Check the judges and the number of images per prompt before anything is drawn.

        Args:
            generation_kwargs: of the task, with the keys of `--gen_kwargs`.

        Raises:
            UserError: a judge is missing or has other classes than the benchmark, or the number is not at least 1.
        """
        self._check_num_images((generation_kwargs or {}).get("num_images", self.benchmark.num_images))
        try:
            self.benchmark.find_judges(JudgeOptions.from_environment())
        except UserError as error:
            raise UserError(
                f"{self.benchmark.name}: {error}. Nothing has been drawn: --predict_only draws without judging, and "
                "`evotok-eval judge OUTPUT_PATH` judges what was drawn"
            ) from error

    def _check_num_images(self, number: Any) -> None:
        """Reject a number of images per prompt that cannot be drawn, and log one that published scores do not have."""
        expected, name = self.benchmark.num_images, self.benchmark.name
        if type(number) is not int or number < 1:
            raise UserError(f"{name}: num_images must be a whole number of at least 1, got {number!r}")
        if number != expected:
            logger.warning(
                "%s: %d images per prompt instead of %d; the score is not comparable with published ones, leave "
                "num_images out of --gen_kwargs for a comparable run",
                name,
                number,
                expected,
            )

    def process_docs(self, rows: datasets.Dataset) -> datasets.Dataset:
        """Replace the placeholder row, without which lmms-eval does not load a task, by the documents."""
        self.prepare()
        assert self._documents is not None
        return datasets.Dataset.from_list(self._documents)

    # Scoring -------------------------------------------------------------------------------------------------

    def process_results(self, doc: dict, results: Sequence[str]) -> dict:
        """Pass the complete answer to the overall score, and its key to all other metrics."""
        key = uuid.uuid4().hex
        others = dict.fromkeys((*_INTERVAL, *self._skills(doc)), None)
        return {
            OVERALL: {"key": key, "document": dict(doc), "answer": results[0]},
            **{name: {"key": key, "metric": name} for name in others},
        }

    def aggregate_overall(self, items: Sequence[dict], args: Any = None) -> float:
        """Store the images of all answers, judge them and write the report; returns the overall score.

        Args:
            args: lmms-eval's command line: `output_path`, and for the contact sheet the model and its arguments.

        Raises:
            UserError: an answer without images, or a broken image; the message says where the images are stored.
        """
        folder = new_folder(Path(getattr(args, "output_path", None) or _DEFAULT_FOLDER) / "drawn", self.benchmark.name)
        answers = [(item["document"], item["answer"]) for item in items]
        run = store_drawn_run(folder, self.benchmark.name, answers, about=drawn_with.of_command_line(args))
        try:
            outcome = judge_run(run, self.benchmark, JudgeOptions.from_environment())
        except Exception as error:
            error.add_note(f"all drawn images are stored; `evotok-eval judge {folder}` judges them")
            raise
        keys = {item["document"]["index"]: item["key"] for item in items}
        self._marks = {key: {} for key in keys.values()}
        for judgement in outcome.judgements:
            for skill, marks in judgement.marks.items():
                self._marks[keys[judgement.index]].setdefault(skill, []).extend(marks)
        self._scores = outcome.scores
        return self._scores[OVERALL].value

    def aggregate_interval(self, items: Sequence[dict]) -> float:
        """The lower or upper end of the interval of the overall score."""
        return getattr(self._scores[OVERALL], _INTERVAL[items[0]["metric"]])

    def aggregate_skill(self, items: Sequence[dict]) -> float:
        """The score of a skill: the mean of the marks of all images of its documents."""
        return float(np.mean([mark for item in items for mark in self._marks[item["key"]][item["metric"]]]))
