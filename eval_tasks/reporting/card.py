"""The report card: runs and published models side by side, with what is not comparable marked; Markdown and JSON."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from eval_tasks.reporting.published import CardRow, PublishedModel
from eval_tasks.reporting.runs import Run, TaskResult
from evotok_plugin.errors import UserError

MARK = "*"


@dataclass(frozen=True)
class Cell:
    """A figure in its row's unit; `differs` says why published figures cannot be compared with it, or it with ours."""

    value: float
    differs: str = ""


@dataclass(frozen=True)
class FilledRow:
    """A benchmark: our cells by run, published cells by model; `beside` is what no skill scores, by run."""

    benchmark: CardRow
    ours: dict[str, Cell]
    theirs: dict[str, Cell]
    beside: dict[str, float]


@dataclass(frozen=True)
class ReportCard:
    """Rows in order, of the tasks that a run has been given, and the published models that have a figure in them."""

    runs: list[Run]
    published: list[PublishedModel]
    rows: list[FilledRow]

    def as_markdown(self) -> str:
        """The table, what the marks mean, what was evaluated, and where published figures stand."""
        names = [run.name for run in self.runs], [model.name for model in self.published]
        lines = [_line("", *names[0], *names[1]), _line("---", *["---:"] * (len(names[0]) + len(names[1])))]
        reasons: dict[str, int] = {}
        for row in self.rows:
            cells = [
                _cell(row, row.ours.get(run.name), reasons) or _without_figure(run.tasks.get(row.benchmark.task))
                for run in self.runs
            ]
            cells += [_cell(row, row.theirs.get(name), reasons) for name in names[1]]
            lines.append(_line(_label(row), *cells))
            if row.beside:
                beside = [_number(row.benchmark, row.beside[name]) if name in row.beside else "" for name in names[0]]
                lines.append(_line(f"- {row.benchmark.beside}", *beside, *[""] * len(names[1])))
        parts = ["\n".join(lines)]
        if reasons:
            parts.append("Not comparable:\n\n" + "\n".join(f"{n}. {reason}" for reason, n in reasons.items()))
        parts.append("Evaluated:\n\n" + "\n".join(_about(run) for run in self.runs))
        if unreadable := [line for run in self.runs for line in run.unreadable]:
            parts.append("Not readable:\n\n" + "\n".join(f"- {line}" for line in unreadable))
        if sources := [line for model in self.published if (line := _sources(model, self.rows))]:
            parts.append("Published:\n\n" + "\n".join(sources))
        return "\n\n".join(parts) + "\n"

    def as_json(self) -> str:
        """Everything, figures unrounded."""
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
                    "beside": row.beside,
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
    """Put runs beside published models.

    Args:
        rows: benchmarks in order; tasks of the runs that have none are shown last, all their metrics.

    Raises:
        UserError: no run has a figure to show.
    """
    runs = _with_own_names(runs)
    known = [*rows, *_unknown_tasks(runs, rows)]
    shown = [row for benchmark in known if (row := _row(benchmark, runs, models)) is not None]
    if not any(row.ours for row in shown):
        tasks = ", ".join(task for run in runs for task in run.tasks)
        raise UserError(
            f"no figures for {tasks}: nothing was scored, or the task only writes a submission file; "
            "evaluate a task with a figure, or score the submission"
        )
    compared = [model for model in models if any(model.name in row.theirs for row in shown)]
    return ReportCard(list(runs), compared, shown)


def _with_own_names(runs: Sequence[Run]) -> list[Run]:
    """Folders of one name are told apart by a number."""
    names: dict[str, int] = {}
    own = []
    for run in runs:
        names[run.name] = names.get(run.name, 0) + 1
        own.append(run if names[run.name] == 1 else replace(run, name=f"{run.name} ({names[run.name]})"))
    return own


def _unknown_tasks(runs: Sequence[Run], rows: Sequence[CardRow]) -> list[CardRow]:
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


def _row(benchmark: CardRow, runs: Sequence[Run], models: Sequence[PublishedModel]) -> FilledRow | None:
    """None if no run was given the task, or there is nothing to show. A figure that a task left out, as rFID where
    weights are missing, has a row where others have published it; a task without any figure always has one."""
    if not any(benchmark.task in run.tasks for run in runs):
        return None
    ours, beside = {}, {}
    for run in runs:
        result = run.tasks.get(benchmark.task)
        if result is None or benchmark.metric not in result.figures:
            continue
        ours[run.name] = Cell(benchmark.scale * result.figures[benchmark.metric], _why_ours_differs(benchmark, result))
        if benchmark.beside in result.figures:
            beside[run.name] = benchmark.scale * result.figures[benchmark.beside]
    theirs = {}
    for model in models:
        if figure := model.figures.get(benchmark.name):
            theirs[model.name] = Cell(figure.value, "; ".join(filter(None, (benchmark.differs, figure.differs))))
    empty = any(not run.tasks[benchmark.task].figures for run in runs if benchmark.task in run.tasks)
    return FilledRow(benchmark, ours, theirs, beside) if ours or theirs or empty else None


def _why_ours_differs(benchmark: CardRow, result: TaskResult) -> str:
    if result.limited:
        count = "some" if result.documents is None else result.documents
        return f"{result.task}: only {count} documents were asked"
    made_of = tuple(int(result.figures.get(name, 0)) for name in ("num_images", "image_size"))
    wanted = benchmark.images, benchmark.image_size
    if benchmark.images and made_of != wanted:
        ours, theirs = (f"{count} images of {side} x {side}" for count, side in (made_of, wanted))
        return f"{benchmark.name}: ours is of {ours}, published ones of ImageNet-1K val, {theirs}"
    return ""


# Markdown ------------------------------------------------------------------------------------------------------


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _label(row: FilledRow) -> str:
    return f"{row.benchmark.name} {'(lower is better)' if row.benchmark.lower else ''}".strip()


def _number(benchmark: CardRow, value: float) -> str:
    return f"{value:.{benchmark.digits}f}"


def _cell(row: FilledRow, cell: Cell | None, reasons: dict[str, int]) -> str:
    """A figure; one that is not comparable is followed by the numbers of its reasons."""
    if cell is None:
        return ""
    text = _number(row.benchmark, cell.value)
    if not cell.differs:
        return text
    number = reasons.setdefault(cell.differs, len(reasons) + 1)
    return f"{text} {MARK}{number}"


def _without_figure(result: TaskResult | None) -> str:
    """The cell of a run that has no figure in a row."""
    if result is None:
        return ""
    return "not measured" if result.figures else "no figure"


def _about(run: Run) -> str:
    return f"- **{run.name}**: {run.model}; " + ", ".join(_asked(result) for result in run.tasks.values())


def _asked(result: TaskResult) -> str:
    """How much a task's figures rest on."""
    if "num_images" in result.figures:
        return f"{result.task} {result.figures['num_images']:.0f} images"
    if result.documents is None:
        return result.task
    return f"{result.task} {result.documents} documents"


def _sources(model: PublishedModel, rows: Sequence[FilledRow]) -> str:
    """Where the figures that are shown stand; empty if none is."""
    by_source: dict[str, list[str]] = {}
    for row in rows:
        if figure := model.figures.get(row.benchmark.name):
            by_source.setdefault(f"{figure.source} ({figure.setting})", []).append(row.benchmark.name)
    if not by_source:
        return ""
    return f"- **{model.name}**: " + "; ".join(f"{', '.join(names)}: {source}" for source, names in by_source.items())
