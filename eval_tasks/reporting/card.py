"""The report card: runs next to published models, with incomparable figures marked; as Markdown and JSON."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from eval_tasks.reporting.published import CardRow, PublishedModel
from eval_tasks.reporting.results import TaskResult
from eval_tasks.reporting.runs import Run
from evotok_plugin.common.templates import open_template
from evotok_plugin.errors import UserError

MARK = "*"


@dataclass(frozen=True)
class Cell:
    """A figure in the unit of its row; `differs` is the reason why ours and published figures are not comparable."""

    value: float
    differs: str = ""


@dataclass(frozen=True)
class FilledRow:
    """The figures of one benchmark.

    Attributes:
        ours: cells by run.
        theirs: cells by published model.
        baseline: by run, the score of a model without any skill.
    """

    benchmark: CardRow
    ours: dict[str, Cell]
    theirs: dict[str, Cell]
    baseline: dict[str, float]


@dataclass(frozen=True)
class ReportCard:
    """Rows in order, for the tasks of the runs, and the published models with a figure in any of these rows."""

    runs: list[Run]
    published: list[PublishedModel]
    rows: list[FilledRow]

    def as_markdown(self) -> str:
        """The table, the reasons behind its marks, what was evaluated, and the sources of published figures."""
        runs, models = [run.name for run in self.runs], [model.name for model in self.published]
        table: list[list[str]] = []
        reasons: dict[str, int] = {}
        for row in self.rows:
            cells = [
                _cell(row, row.ours.get(run.name), reasons) or _without_figure(run.tasks.get(row.benchmark.task))
                for run in self.runs
            ]
            cells += [_cell(row, row.theirs.get(name), reasons) for name in models]
            table.append([_label(row), *cells])
            if row.baseline:
                values = [_number(row.benchmark, row.baseline[name]) if name in row.baseline else "" for name in runs]
                table.append([f"- {row.benchmark.baseline}", *values, *[""] * len(models)])
        sources = {model.name: _sources(model, self.rows) for model in self.published}
        template = open_template("eval_tasks.reporting", "report.md.jinja")
        return template.render(
            header=["", *runs, *models],
            alignment=["---", *["---:"] * (len(runs) + len(models))],
            table=table,
            reasons=list(reasons),
            runs=[
                {"name": run.name, "model": run.model, "coverage": [_coverage(r) for r in run.tasks.values()]}
                for run in self.runs
            ],
            unreadable=[error for run in self.runs for error in run.unreadable],
            sources={name: figures for name, figures in sources.items() if figures},
        )

    def as_json(self) -> str:
        """All figures, unrounded, as JSON."""
        content = {
            "runs": [
                {
                    "name": run.name,
                    "model": run.model,
                    "unreadable": list(run.unreadable),
                    "tasks": {
                        task: {"file": str(result.file), "documents": result.documents, "limited": result.limited}
                        | {"figures": result.figures}
                        for task, result in run.tasks.items()
                    },
                }
                for run in self.runs
            ],
            "rows": [
                {
                    "name": row.benchmark.name,
                    "task": row.benchmark.task,
                    "metric": row.benchmark.metric,
                    "ours": {name: vars(cell) for name, cell in row.ours.items()},
                    "beside": row.baseline,
                    "published": {
                        model.name: vars(model.figures[row.benchmark.name])
                        | {"differs": row.theirs[model.name].differs}
                        for model in self.published
                        if model.name in row.theirs
                    },
                }
                for row in self.rows
            ],
        }
        return json.dumps(content, indent=1) + "\n"


def make_card(runs: Sequence[Run], rows: Sequence[CardRow], models: Sequence[PublishedModel]) -> ReportCard:
    """Put runs next to published models.

    Args:
        rows: the card's rows in order; tasks without a row follow with all their metrics.

    Raises:
        UserError: no run has a figure to show.
    """
    runs = _with_unique_names(runs)
    known = [*rows, *_unknown_tasks(runs, rows)]
    shown = [row for benchmark in known if (row := _fill(benchmark, runs, models)) is not None]
    if not any(row.ours for row in shown):
        tasks = ", ".join(task for run in runs for task in run.tasks)
        raise UserError(
            f"no figures for {tasks}: nothing was scored, or the task only writes a submission file; "
            "evaluate a task with a figure, or score the submission"
        )
    compared = [model for model in models if any(model.name in row.theirs for row in shown)]
    return ReportCard(list(runs), compared, shown)


def _with_unique_names(runs: Sequence[Run]) -> list[Run]:
    """Number the runs whose folders have the same name."""
    counts: dict[str, int] = {}
    renamed = []
    for run in runs:
        counts[run.name] = counts.get(run.name, 0) + 1
        renamed.append(run if counts[run.name] == 1 else replace(run, name=f"{run.name} ({counts[run.name]})"))
    return renamed


def _unknown_tasks(runs: Sequence[Run], rows: Sequence[CardRow]) -> list[CardRow]:
    """A row for each metric of each task that has no row, and one for a task without metrics."""
    tasks = {row.task for row in rows}
    metrics = dict.fromkeys(
        (task, metric)
        for run in runs
        for task, result in run.tasks.items()
        if task not in tasks
        for metric in result.figures or ("",)
    )
    scored = {task for task, metric in metrics if metric}
    return [
        CardRow(name=f"{task}: {metric}" if metric else task, group="other", task=task, metric=metric, digits=3)
        for task, metric in metrics
        if metric or task not in scored
    ]


def _fill(benchmark: CardRow, runs: Sequence[Run], models: Sequence[PublishedModel]) -> FilledRow | None:
    """Fill a row; None if no run evaluated its task, or nothing is known about it.

    A task without any figure always has a row. A single figure that a task left out (rFID without its weights) has one
    only if a model has published it.
    """
    if not any(benchmark.task in run.tasks for run in runs):
        return None
    ours, baseline = {}, {}
    for run in runs:
        result = run.tasks.get(benchmark.task)
        if result is None or benchmark.metric not in result.figures:
            continue
        ours[run.name] = Cell(benchmark.scale * result.figures[benchmark.metric], _why_ours_differs(benchmark, result))
        if benchmark.baseline in result.figures:
            baseline[run.name] = benchmark.scale * result.figures[benchmark.baseline]
    theirs = {}
    for model in models:
        if figure := model.figures.get(benchmark.name):
            theirs[model.name] = Cell(figure.value, "; ".join(filter(None, (benchmark.differs, figure.differs))))
    empty = any(not run.tasks[benchmark.task].figures for run in runs if benchmark.task in run.tasks)
    return FilledRow(benchmark, ours, theirs, baseline) if ours or theirs or empty else None


def _why_ours_differs(benchmark: CardRow, result: TaskResult) -> str:
    if result.limited:
        count = "some" if result.documents is None else result.documents
        return f"{result.task}: only {count} documents were evaluated"
    drawn, wanted = result.images_per_prompt, benchmark.images_per_prompt
    if wanted and drawn not in (None, wanted):
        return f"{benchmark.name}: ours has {drawn} images per prompt, published ones {wanted}"
    measured = tuple(int(result.figures.get(name, 0)) for name in ("num_images", "image_size"))
    published = benchmark.images, benchmark.image_size
    if benchmark.images and measured != published:
        ours, theirs = (f"{count} images of {side} x {side}" for count, side in (measured, published))
        return f"{benchmark.name}: ours is on {ours}, published ones on ImageNet-1K val, {theirs}"
    return ""


# Markdown ------------------------------------------------------------------------------------------------------


def _label(row: FilledRow) -> str:
    return f"{row.benchmark.name} {'(lower is better)' if row.benchmark.lower else ''}".strip()


def _number(benchmark: CardRow, value: float) -> str:
    return f"{value:.{benchmark.digits}f}"


def _cell(row: FilledRow, cell: Cell | None, reasons: dict[str, int]) -> str:
    """A figure; one that is not comparable is followed by the number of its reason."""
    if cell is None:
        return ""
    text = _number(row.benchmark, cell.value)
    if not cell.differs:
        return text
    number = reasons.setdefault(cell.differs, len(reasons) + 1)
    return f"{text} {MARK}{number}"


def _without_figure(result: TaskResult | None) -> str:
    """The cell of a run without a figure in a row."""
    if result is None:
        return ""
    return "not measured" if result.figures else "no figure"


def _coverage(result: TaskResult) -> str:
    """The number of documents or images behind a task's figures."""
    if "num_images" in result.figures:
        return f"{result.task} {result.figures['num_images']:.0f} images"
    if result.documents is None:
        return result.task
    return f"{result.task} {result.documents} documents"


def _sources(model: PublishedModel, rows: Sequence[FilledRow]) -> dict[str, list[str]]:
    """The benchmarks whose published figures are shown, by source."""
    by_source: dict[str, list[str]] = {}
    for row in rows:
        if figure := model.figures.get(row.benchmark.name):
            by_source.setdefault(f"{figure.source} ({figure.setting})", []).append(row.benchmark.name)
    return by_source
