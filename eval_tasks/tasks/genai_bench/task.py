"""The task `genai_bench`: GenAI-Bench's 1600 prompts, judged by VQAScore.

Source: GenAI-Bench (arXiv 2406.13743), VQAScore (arXiv 2404.01291): the probability that a VQA model answers Yes to
`Does this figure show "{prompt}"? Please answer yes or no.` Scores by different judges are not comparable.
"""

import ast
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eval_tasks.judging.judge_run import Batch, Benchmark
from eval_tasks.judging.scores import Judgement, Stopwatch
from eval_tasks.judging.vqa import VQA_SCORE_QUESTION, YesNoJudge, find_judges, open_vqa
from eval_tasks.judging.weights import fetch
from eval_tasks.tasks.judged_task import JudgedTask
from eval_tasks.tasks.prompt_files import column, read_rows, whole_number
from evotok_plugin.errors import UserError

PROMPTS_VARIABLE = "EVOTOK_GENAI_BENCH_PROMPTS"
PROMPTS = "BaiqiL/GenAI-Bench-1600"
BASIC = ("attribute", "scene", "spatial relation", "action relation", "part relation")
ADVANCED = ("counting", "comparison", "differentiation", "negation", "universal")
_GROUPS = ("basic", "advanced")
_KNOWN = (*_GROUPS, *BASIC, *ADVANCED)
_PROMPTS_FILE, _SKILLS_FILE = "genai_image.json", "genai_skills.json"


class VqaScoreJudge:
    """Scores each image by the VQAScore of its prompt."""

    def __init__(self, vqa: YesNoJudge) -> None:
        self.vqa, self.stopwatch = vqa, Stopwatch()

    def judge(self, batches: Iterator[Batch]) -> Iterator[Judgement]:
        """Judge images of documents with `prompt` and `skills`."""
        for batch in batches:
            questions = [VQA_SCORE_QUESTION.format(prompt=drawn.document["prompt"]) for drawn, _ in batch]
            with self.stopwatch:
                answers = self.vqa.ask([image for _, image in batch], questions)
            for (drawn, _), answer in zip(batch, answers, strict=True):
                yield Judgement(
                    index=drawn.index,
                    sample=drawn.sample,
                    image=drawn.image,
                    prompt=drawn.document["prompt"],
                    score=answer.yes,
                    marks={skill: [answer.yes] for skill in drawn.document["skills"]},
                )


# Prompts -------------------------------------------------------------------------------------------------------


def read_prompts(source: str | Path) -> list[dict]:
    """Read documents from the benchmark's pair of files, or from a table.

    Args:
        source: a folder with genai_image.json and genai_skills.json, a table with the columns Prompt and Tags (or
            basic_skills and advanced_skills), or a data set of the hub that holds the pair.

    Raises:
        UserError: a missing file, another format, or an unknown skill.
    """
    files = (_PROMPTS_FILE, _SKILLS_FILE)
    path = fetch(str(source), "GenAI-Bench's prompts", PROMPTS_VARIABLE, files, dataset=True)
    if path.is_dir():
        return _from_pair(path)
    documents = []
    for number, row in enumerate(read_rows(path)):
        tags = [str(tag).lower().replace("_", " ") for tag in _tags(row, path)]
        groups = [group for group, members in zip(_GROUPS, (BASIC, ADVANCED), strict=True) if set(tags) & set(members)]
        # A prompt with any advanced skill is advanced.
        documents.append(_document(number, column(row, ("prompt", "text"), path), [*groups[-1:], *tags], path))
    return documents


def _from_pair(folder: Path) -> list[dict]:
    """Read the benchmark's files: prompts by number, and numbers by skill."""
    missing = [name for name in (_PROMPTS_FILE, _SKILLS_FILE) if not (folder / name).is_file()]
    if missing:
        raise UserError(f"GenAI-Bench's prompts: {folder} is missing {' and '.join(missing)} of {PROMPTS}")
    rows = read_rows(folder / _PROMPTS_FILE)
    try:
        members = {
            skill: set(map(int, numbers)) for skill, numbers in json.loads((folder / _SKILLS_FILE).read_text()).items()
        }
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{folder / _SKILLS_FILE} must hold lists of prompt numbers by skill ({error})") from error
    documents = []
    for row in rows:
        number = whole_number(column(row, ("id",), folder / _PROMPTS_FILE), "id", folder / _PROMPTS_FILE)
        skills = [skill for skill in members if number in members[skill]]
        documents.append(_document(number, column(row, ("prompt",), folder / _PROMPTS_FILE), skills, folder))
    return documents


def _literal(text: str, path: Path) -> Any:
    """Parse a list or mapping that was written as JSON or as a Python literal."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, RecursionError):
            continue
    raise UserError(f"prompts file {path}: {text[:80]!r} is neither JSON nor a Python literal")


def _tags(row: dict, path: Path) -> list[str]:
    """The skills of a table's row, from one column of tags or two, as lists or text, nested or not."""
    plain = {str(name).strip().lower(): value for name, value in row.items()}
    nested = plain.get("tags") or plain.get("skills") or {}
    if isinstance(nested, str) and nested.lstrip()[:1] in ("{", "["):
        nested = _literal(nested, path)
    if isinstance(nested, dict):
        plain |= {str(name).lower(): value for name, value in nested.items()}
        nested = [plain.get(name) for name in ("basic_skills", "advanced_skills", "basic", "advanced")]
    tags = [tag for part in ([nested] if isinstance(nested, str) else nested) if part for tag in _listed(part)]
    if not tags:
        raise UserError(f"prompts file {path}: a row has no skills; it needs Tags, or basic_skills and advanced_skills")
    return tags


def _listed(value: Any) -> list[str]:
    """Split a text at commas or bars; turn the items of a list into texts."""
    if isinstance(value, str):
        return [tag.strip(" '\"") for tag in re.split(r"[,|]", value.strip("[]")) if tag.strip(" '\"")]
    return [str(tag) for tag in value]


def _document(index: int, prompt: object, skills: list[str], path: Path) -> dict:
    unknown = [skill for skill in skills if skill not in _KNOWN]
    if unknown or not skills:
        raise UserError(
            f"prompts file {path}: prompt {index} has the skills {skills or 'none'}, known are {', '.join(_KNOWN)}"
        )
    ordered = [skill for skill in _KNOWN if skill in skills]
    return {"index": index, "prompt": str(prompt), "skills": ordered}


def documents() -> list[dict]:
    """The prompts of `$EVOTOK_GENAI_BENCH_PROMPTS`, by default from the hub."""
    return read_prompts(os.environ.get(PROMPTS_VARIABLE) or PROMPTS)


# The benchmark -------------------------------------------------------------------------------------------------


BENCHMARK = Benchmark(
    name="genai_bench",
    overall="images",
    num_images=1,
    documents=documents,
    find_judges=find_judges,
    open_judge=lambda options: VqaScoreJudge(open_vqa(options)),
)

_TASK = JudgedTask(BENCHMARK, documents, lambda document: document["skills"])
process_docs, process_results = _TASK.process_docs, _TASK.process_results
aggregate_overall, aggregate_interval = _TASK.aggregate_overall, _TASK.aggregate_interval
aggregate_skill = _TASK.aggregate_skill
