"""What a drawing benchmark is to the code that keeps, judges and reports: its skills, its judge, its way to an overall
score; and judging a kept run from its first image to its report.
"""

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

logger = logging.getLogger(__name__)

Batch = Sequence[tuple[Drawn, Image.Image]]


class ImageJudge(Protocol):
    """Judges a stream of images; `stopwatch` counts the seconds of its models."""

    stopwatch: Stopwatch

    def judge(self, batches: Iterator[Batch]) -> Iterator[Judgement]:
        """One judgement an image, in order; it may look further ahead than it answers."""
        ...


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A drawing benchmark.

    Attributes:
        name: of the lmms-eval task.
        overall: the overall score is the mean of the skills or of the images.
        find_judges: the local folders of its judges, fetched if need be; raises a ValueError that says what is missing.
        open_judge: loads them.
    """

    name: str
    overall: Literal["skills", "images"]
    find_judges: Callable[[JudgeOptions], dict[str, str]]
    open_judge: Callable[[JudgeOptions], ImageJudge]


@dataclass(frozen=True)
class Outcome:
    """A judged run: its judgements in order and its scores by name, `overall` first."""

    judgements: list[Judgement]
    scores: dict[str, Score]


def judge_run(run: DrawnRun, benchmark: Benchmark, options: JudgeOptions, output: Path | None = None) -> Outcome:
    """Judge all images of a kept run and write `judgements.jsonl`, `scores.json` and the contact sheets.

    Judgements are written as they come; the judges leave memory before the report is made.

    Args:
        output: folder of the report, by default the run's own.

    Raises:
        UserError: an image cannot be read, or a judge is missing.
    """
    started, output = time.perf_counter(), output or run.folder
    output.mkdir(parents=True, exist_ok=True)
    judges = benchmark.find_judges(options)
    judge = benchmark.open_judge(options)
    loaded = time.perf_counter()
    judgements = []
    unfinished = output / "judgements.jsonl.part"
    with unfinished.open("w") as lines, tqdm(total=len(run.drawn), desc=f"judging {run.task}", unit="image") as bar:
        for judgement in judge.judge(run.images(options.batch_size)):
            judgements.append(judgement)
            lines.write(json.dumps(asdict(judgement)) + "\n")
            bar.update()
    unfinished.replace(output / "judgements.jsonl")
    model_seconds, device = judge.stopwatch.seconds, options.torch_device
    del judge
    if device.type == "cuda":
        torch.cuda.empty_cache()
    scores = summarize(judgements, benchmark.overall)
    write_report(output, run, judgements, scores)
    seconds = {"loading": loaded - started, "models": model_seconds}
    seconds["beside"] = time.perf_counter() - loaded - model_seconds
    _write_scores(output / "scores.json", run, options, judges, scores, seconds)
    logger.info("%s: %s", run.task, as_text(scores))
    return Outcome(judgements, scores)


def _write_scores(
    path: Path, run: DrawnRun, options: JudgeOptions, judges: dict[str, str], scores: dict[str, Score], seconds: dict
) -> None:
    """Figures, who judged, and where the time went: the judges' models, and all that the task adds to them."""
    content = {
        "task": run.task,
        "images": len(run.drawn),
        "judges": judges,
        "device": str(options.torch_device),
        "batch_size": options.batch_size,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "scores": {name: asdict(score) for name, score in scores.items()},
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def as_text(scores: dict[str, Score]) -> str:
    """The overall score with its interval, then the skills."""
    figures = [f"{name} {score.value:.3f} [{score.low:.3f}, {score.high:.3f}]" for name, score in scores.items()]
    return ", ".join(figures)


def as_table(scores: dict[str, Score]) -> str:
    """Scores as a Markdown table."""
    rows = ["| | score | 95 % interval | prompts |", "|---|---|---|---|"]
    for name, score in scores.items():
        label = f"**{name}**" if name == OVERALL else name
        rows.append(f"| {label} | {score.value:.3f} | {score.low:.3f} to {score.high:.3f} | {score.num_prompts} |")
    return "\n".join(rows)
