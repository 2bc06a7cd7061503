"""A benchmark as an lmms-eval task: documents, answers kept, all images judged at once, figures by name.

lmms-eval scores document by document; judges work in batches, and only when the drawing model has left memory. So a
document's answer is only passed on, and the overall figure, which is asked for first, keeps and judges the whole run.
"""

import json
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
import numpy as np

from eval_tasks.judging.drawn_run import new_folder, store_drawn_run
from eval_tasks.judging.judge_run import Benchmark, judge_run
from eval_tasks.judging.options import JudgeOptions
from eval_tasks.judging.scores import OVERALL, Score
from evotok_plugin.errors import UserError

_INTERVAL = {f"{OVERALL}_low": "low", f"{OVERALL}_high": "high"}
_NO_FOLDER = "outputs/lmms_eval"  # without --output_path


def doc_to_visual(doc: dict) -> list:
    """A drawing prompt shows no image."""
    return []


def doc_to_target(doc: dict) -> str:
    """The whole document as JSON: of a document lmms-eval's samples keep only this, and judging later needs it all."""
    return json.dumps(doc)


class JudgedTask:
    """What a task's YAML names: `process_docs`, `process_results` and one aggregation a metric.

    Args:
        benchmark: how it is judged.
        documents: the prompts, `index` and `prompt` in each; called once.
        skills: of a document: the metrics that it counts for.
    """

    def __init__(
        self, benchmark: Benchmark, documents: Callable[[], list[dict]], skills: Callable[[dict], Sequence[str]]
    ) -> None:
        self.benchmark, self._load, self._skills = benchmark, documents, skills
        self._documents: list[dict] | None = None
        self._marks: dict[str, dict[str, list[float]]] = {}  # of each answer, by its key
        self._scores: dict[str, Score] = {}

    # Before drawing ------------------------------------------------------------------------------------------

    def prepare(self) -> dict:
        """Load the documents; returns the judges' options, for the results.

        Raises:
            UserError: no prompts, or an option that means nothing.
        """
        options = JudgeOptions.from_environment()
        if self._documents is None:
            self._documents = self._load()
        return options.as_dict()

    def before_drawing(self) -> None:
        """Find the judges.

        Raises:
            UserError: one is missing: better told now than when everything is drawn.
        """
        try:
            self.benchmark.find_judges(JudgeOptions.from_environment())
        except ValueError as error:
            raise UserError(
                f"{self.benchmark.name}: {error}. Nothing has been drawn: --predict_only draws without judging, and "
                "`evotok-eval judge OUTPUT_PATH` judges what was drawn"
            ) from error

    def process_docs(self, rows: datasets.Dataset) -> datasets.Dataset:
        """The documents, in place of the task's own row, which lmms-eval needs but says nothing."""
        self.prepare()
        return datasets.Dataset.from_list(self._documents)

    # Scoring -------------------------------------------------------------------------------------------------

    def process_results(self, doc: dict, results: Sequence[str]) -> dict:
        """Pass the answer on: whole for the overall score, by its key for everything else."""
        key = uuid.uuid4().hex
        others = dict.fromkeys((*_INTERVAL, *self._skills(doc)), None)
        return {
            OVERALL: {"key": key, "document": dict(doc), "answer": results[0]},
            **{name: {"key": key, "metric": name} for name in others},
        }

    def aggregate_overall(self, items: Sequence[dict], args=None) -> float:
        """Keep the images of all answers, judge them, report; the overall score.

        Raises:
            UserError: an answer is no drawing or an image is broken; the images stay where the error says.
        """
        folder = new_folder(Path(getattr(args, "output_path", None) or _NO_FOLDER) / "drawn", self.benchmark.name)
        run = store_drawn_run(folder, self.benchmark.name, [(item["document"], item["answer"]) for item in items])
        try:
            outcome = judge_run(run, self.benchmark, JudgeOptions.from_environment())
        except Exception as error:
            error.add_note(f"everything drawn is kept; `evotok-eval judge {folder}` judges it")
            raise
        keys = {item["document"]["index"]: item["key"] for item in items}
        self._marks = {key: {} for key in keys.values()}
        for judgement in outcome.judgements:
            for skill, marks in judgement.marks.items():
                self._marks[keys[judgement.index]].setdefault(skill, []).extend(marks)
        self._scores = outcome.scores
        return self._scores[OVERALL].value

    def aggregate_interval(self, items: Sequence[dict]) -> float:
        """An end of the overall score's interval."""
        return getattr(self._scores[OVERALL], _INTERVAL[items[0]["metric"]])

    def aggregate_skill(self, items: Sequence[dict]) -> float:
        """A skill's score: the mean of the marks of all images of its documents."""
        return float(np.mean([mark for item in items for mark in self._marks[item["key"]][item["metric"]]]))
