"""The task `dpg_bench`: DPG-Bench's 1065 long prompts, judged by yes-or-no questions that depend on each other.

Source: DPG-Bench (ELLA, arXiv 2403.05135). The score of an image is the share of its prompt's questions answered with
yes, where a question counts as no if one of its parents does; the categories use the answers as given. The original
judge is mPLUG-large, which transformers does not have; scores by another judge are not comparable with published ones.
The original program also skips the first question of its file; here all questions count.
"""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from eval_tasks.judging.drawn_run import Drawn
from eval_tasks.judging.judge_run import Batch, Benchmark
from eval_tasks.judging.options import JudgeOptions
from eval_tasks.judging.scores import Judgement, Stopwatch
from eval_tasks.judging.vqa import Answer, YesNoJudge, find_judges, open_vqa
from eval_tasks.judging.weights import fetch
from eval_tasks.tasks.judged_task import JudgedTask
from eval_tasks.tasks.prompt_files import column, read_rows, whole_number
from evotok_plugin.common.files import user_path
from evotok_plugin.errors import UserError

PROMPTS_VARIABLE = "EVOTOK_DPG_BENCH_PROMPTS"
PROMPTS = "dpg_bench.csv"
CATEGORIES = ("global", "entity", "attribute", "relation", "other")
_ORIGIN = "https://github.com/TencentQQGYLab/ELLA/blob/main/dpg_bench/dpg_bench.csv"
_QUESTION = "{question} Please answer yes or no."


class DpgJudge:
    """Asks all questions of an image's prompt; questions about several images share a batch."""

    def __init__(self, vqa: YesNoJudge, batch_size: int) -> None:
        self.vqa, self.batch_size, self.stopwatch = vqa, batch_size, Stopwatch()

    def judge(self, batches: Iterator[Batch]) -> Iterator[Judgement]:
        """Judge images of documents with `questions`."""
        for batch in batches:
            asked = [json.loads(drawn.document["questions"]) for drawn, _ in batch]
            rows = [
                (image, _QUESTION.format(question=question["question"]))
                for (_, image), questions in zip(batch, asked, strict=True)
                for question in questions
            ]
            answers = iter(self._ask(rows))
            for (drawn, _), questions in zip(batch, asked, strict=True):
                yield _judgement(drawn, questions, [next(answers) for _ in questions])

    def _ask(self, rows: Sequence[tuple[Image.Image, str]]) -> list[Answer]:
        answers: list[Answer] = []
        for start in range(0, len(rows), self.batch_size):
            images, questions = zip(*rows[start : start + self.batch_size], strict=True)
            with self.stopwatch:
                answers += self.vqa.ask(images, questions)
        return answers


def dependent_answers(questions: Sequence[dict], answers: Sequence[bool]) -> list[bool]:
    """Set answers to no where a parent's answer is no; questions are processed in order, so that no propagates."""
    final = dict(zip((question["id"] for question in questions), answers, strict=True))
    for question in questions:
        final[question["id"]] &= all(final[parent] for parent in question["parents"])
    return list(final.values())


def _judgement(drawn: Drawn, questions: Sequence[dict], answers: Sequence[Answer]) -> Judgement:
    given = [answer.yes > answer.no for answer in answers]
    final = dependent_answers(questions, given)
    marks: dict[str, list[float]] = {}
    for question, yes in zip(questions, given, strict=True):
        for name in dict.fromkeys((question["category"], question["kind"])):
            marks.setdefault(name, []).append(float(yes))
    failed = [question["question"] for question, yes in zip(questions, final, strict=True) if not yes]
    return Judgement(
        index=drawn.index,
        sample=drawn.sample,
        image=drawn.image,
        prompt=drawn.document["prompt"],
        score=sum(final) / len(final),
        marks=marks,
        reason="; ".join(failed),
        details={
            "yes": [round(answer.yes, 4) for answer in answers],
            "no": [round(answer.no, 4) for answer in answers],
        },
    )


# Prompts -------------------------------------------------------------------------------------------------------


def read_prompts(source: str | Path) -> list[dict]:
    """Read DPG-Bench's table (item_id, text, proposition_id, dependency, tuple, question_natural_language).

    Raises:
        UserError: a missing file, another format, or a question that depends on a missing one.
    """
    path = user_path(source)
    if not path.exists() and str(source).count("/") != 1:
        raise UserError(
            f"DPG-Bench's prompts: {str(source)!r} does not exist; download {_ORIGIN} and set {PROMPTS_VARIABLE}"
        )
    path = fetch(str(source), "DPG-Bench's prompts", PROMPTS_VARIABLE, ("*.csv", "*.parquet"), dataset=True)
    if path.is_dir():
        tables = sorted(file for file in path.rglob("*") if file.suffix in (".csv", ".parquet"))
        if len(tables) != 1:
            raise UserError(f"DPG-Bench's prompts: {path} must hold one .csv or .parquet, found {len(tables)}")
        path = tables[0]
    items: dict[str, dict] = {}
    for row in read_rows(path):
        item = items.setdefault(
            str(column(row, ("item_id",), path)), {"prompt": column(row, ("text",), path), "questions": []}
        )
        item["questions"].append(_question(row, path))
    documents = []
    for index, (name, item) in enumerate(items.items()):
        known = {question["id"] for question in item["questions"]}
        orphans = [question for question in item["questions"] if not set(question["parents"]) <= known]
        if orphans:
            raise UserError(
                f"{path}: item {name}, question {orphans[0]['id']} depends on missing ones of {orphans[0]['parents']}"
            )
        documents.append({"index": index, "prompt": str(item["prompt"]), "questions": json.dumps(item["questions"])})
    return documents


def _question(row: dict, path: Path) -> dict:
    # "relation - non-spatial (cup, table)", "global - (photo)"
    category, _, kind = (
        part.strip() for part in str(column(row, ("tuple",), path)).lower().split("(")[0].partition("-")
    )
    if category not in CATEGORIES:
        raise UserError(f"{path}: expected one of {', '.join(CATEGORIES)} as category, got {category!r}")
    dependency = str(column(row, ("dependency",), path)).split(",")
    parents = [whole_number(part, "dependency", path) for part in dependency if part.strip()]
    return {
        "id": whole_number(column(row, ("proposition_id",), path), "proposition_id", path),
        "question": str(column(row, ("question_natural_language",), path)),
        "category": category,
        "kind": f"{category} - {kind}" if kind else category,
        "parents": [parent for parent in parents if parent != 0],
    }


def documents() -> list[dict]:
    """The prompts of `$EVOTOK_DPG_BENCH_PROMPTS`, by default from dpg_bench.csv in the working folder."""
    return read_prompts(os.environ.get(PROMPTS_VARIABLE) or PROMPTS)


def _categories(document: dict) -> list[str]:
    return list(dict.fromkeys(question["category"] for question in json.loads(document["questions"])))


# The benchmark -------------------------------------------------------------------------------------------------


def open_judge(options: JudgeOptions) -> DpgJudge:
    """Load the VQA model on the device of the options."""
    return DpgJudge(open_vqa(options), options.batch_size)


BENCHMARK = Benchmark(
    name="dpg_bench",
    overall="images",
    num_images=4,
    documents=documents,
    find_judges=find_judges,
    open_judge=open_judge,
)

_TASK = JudgedTask(BENCHMARK, documents, _categories)
process_docs, process_results = _TASK.process_docs, _TASK.process_results
aggregate_overall, aggregate_interval = _TASK.aggregate_overall, _TASK.aggregate_interval
aggregate_skill = _TASK.aggregate_skill
