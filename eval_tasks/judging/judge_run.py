"""The judging of a drawn run: a benchmark's judge, its scores, and the report."""

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from PIL import Image
from tqdm import tqdm

from eval_tasks.judging.drawn_run import Drawn, DrawnRun
from eval_tasks.judging.options import JudgeOptions
from eval_tasks.judging.report import write_report
from eval_tasks.judging.scores import OVERALL, Judgement, Score, Stopwatch, summarize
from evotok_plugin.common.files import write_json, writing
from evotok_plugin.common.locks import LOCK, locked
from evotok_plugin.common.progress import progress_bar
from evotok_plugin.errors import UserError

logger = logging.getLogger(__name__)

Batch = Sequence[tuple[Drawn, Image.Image]]


class ImageJudge(Protocol):
    """Judges a stream of images; `stopwatch` measures the seconds spent in its models."""

    stopwatch: Stopwatch

    def judge(self, batches: Iterator[Batch]) -> Iterator[Judgement]:
        """Yield one judgement per image, in order; a judge may read ahead."""
        ...


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A drawing benchmark: its judge and the aggregation of its scores.

    Attributes:
        name: name of the lmms-eval task.
        overall: whether the overall score is the mean over skills or over images.
        num_images: images per prompt behind published scores.
        documents: returns the prompts, with what the judge needs; raises a UserError if they are missing.
        find_judges: locates the weights of the judges, downloading them if necessary, and returns the judges' names;
            raises a UserError that says what is missing.
        open_judge: loads the judge.
    """

    name: str
    overall: Literal["skills", "images"]
    num_images: int
    documents: Callable[[], list[dict]]
    find_judges: Callable[[JudgeOptions], dict[str, str]]
    open_judge: Callable[[JudgeOptions], ImageJudge]


@dataclass(frozen=True)
class Outcome:
    """A judged run: its judgements in order and its scores by name, `overall` first."""

    judgements: list[Judgement]
    scores: dict[str, Score]


def judge_run(run: DrawnRun, benchmark: Benchmark, options: JudgeOptions, output: Path | None = None) -> Outcome:
    """Judge all images of a run and write `judgements.jsonl`, `scores.json` and the contact sheets.

    Each judgement is immediately written to `judgements.jsonl.part`, which is renamed at the end: after an error or an
    interruption it holds the judgements made so far. The judges are freed before the report is written.

    Args:
        output: folder for the report, by default that of the run.

    Raises:
        UserError: an image cannot be read, a judge is missing, or the folder cannot be written to or another process
            is judging into it.
    """
    output = output or run.folder
    with locked(output / LOCK, output):
        return _judge_into(output, run, benchmark, options)


def _judge_into(output: Path, run: DrawnRun, benchmark: Benchmark, options: JudgeOptions) -> Outcome:
    started = time.perf_counter()
    judges = benchmark.find_judges(options)
    judge = benchmark.open_judge(options)
    loaded = time.perf_counter()
    judgements: list[Judgement] = []
    bar: tqdm[Judgement] = progress_bar(total=len(run.drawn), desc=f"judging {run.task}", unit="image")
    unfinished = output / "judgements.jsonl.part"
    with writing(unfinished):
        lines = unfinished.open("w", encoding="utf-8", buffering=1)  # line by line
    with lines, bar:
        for judgement in _judgements(run, judge, options.batch_size):
            judgements.append(judgement)
            with writing(unfinished):
                lines.write(json.dumps(asdict(judgement)) + "\n")
            bar.update()
    with writing(output / "judgements.jsonl"):
        unfinished.replace(output / "judgements.jsonl")
    model_seconds, device = judge.stopwatch.seconds, options.torch_device
    del judge
    if device.type == "cuda":
        torch.cuda.empty_cache()
    scores = summarize(judgements, benchmark.overall)
    write_report(output, run, judgements, scores)
    seconds = {"loading": loaded - started, "models": model_seconds}
    seconds["beside"] = time.perf_counter() - loaded - model_seconds  # everything else
    _write_scores(output / "scores.json", run, options, judges, scores, seconds)
    logger.info("%s: %s", run.task, as_text(scores))
    return Outcome(judgements, scores)


def _judgements(run: DrawnRun, judge: ImageJudge, batch_size: int) -> Iterator[Judgement]:
    try:
        yield from judge.judge(run.images(batch_size))
    except UserError as error:
        raise UserError(f"{run.folder} cannot be judged: {error}") from error


def _write_scores(
    path: Path, run: DrawnRun, options: JudgeOptions, judges: dict[str, str], scores: dict[str, Score], seconds: dict
) -> None:
    """Write the scores, the judges, and the seconds spent in the judges' models and in everything else."""
    content = {
        "task": run.task,
        "images": len(run.drawn),
        "judges": judges,
        "device": str(options.torch_device),
        "batch_size": options.batch_size,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "scores": {name: asdict(score) for name, score in scores.items()},
    }
    write_json(path, content)


def as_text(scores: dict[str, Score]) -> str:
    """Scores with their intervals in one line."""
    figures = [f"{name} {score.value:.3f} [{score.low:.3f}, {score.high:.3f}]" for name, score in scores.items()]
    return ", ".join(figures)


def as_table(scores: dict[str, Score]) -> str:
    """Scores as a Markdown table."""
    rows = ["| | score | 95 % interval | prompts |", "|---|---|---|---|"]
    for name, score in scores.items():
        label = f"**{name}**" if name == OVERALL else name
        rows.append(f"| {label} | {score.value:.3f} | {score.low:.3f} to {score.high:.3f} | {score.num_prompts} |")
    return "\n".join(rows)
