"""The report card as bar charts, one panel per benchmark since units differ; our runs in color."""

from typing import TYPE_CHECKING

from eval_tasks.reporting.card import Cell, FilledRow, ReportCard
from evotok_plugin.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_OURS = ("#0b6e99", "#d9730d", "#4d8b31", "#8a4baf", "#c0392b", "#7f6000")
_THEIRS = "#b8b8b8"
_COLUMNS = 4
_BAR_INCHES = 0.26


def plot_card(card: ReportCard) -> "Figure":
    """Draw the card: incomparable bars are hatched, dashed lines mark the score of a model without any skill.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("the plot needs matplotlib: pip install matplotlib") from error
    rows = [row for row in card.rows if row.ours]
    columns = min(_COLUMNS, len(rows))
    lines = -(-len(rows) // columns)
    bars = max(len(row.ours) + len(row.theirs) for row in rows)
    figure = Figure(figsize=(3.4 * columns, lines * (0.8 + _BAR_INCHES * bars)), dpi=130, layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for panel, row in zip(panels, rows, strict=False):
        _draw(panel, row, card)
        panel.set_ylim(bars - 0.5, -0.5)  # equally high bars in all panels, the first on top
    for panel in panels[len(rows) :]:
        panel.set_axis_off()
    figure.suptitle(
        "hatched: not comparable, see the table; dashed: score without any skill", fontsize=8, color="#555555"
    )
    return figure


def _draw(axes: "Axes", row: FilledRow, card: ReportCard) -> None:
    bars: list[tuple[str, Cell, str]] = []
    for number, run in enumerate(card.runs):
        if run.name in row.ours:
            bars.append((run.name, row.ours[run.name], _OURS[number % len(_OURS)]))
    bars += [(model.name, row.theirs[model.name], _THEIRS) for model in card.published if model.name in row.theirs]
    longest = max(abs(cell.value) for _, cell, _ in bars) or 1.0
    for place, (_, cell, color) in enumerate(bars):
        hatch = "////" if cell.differs else None
        axes.barh(place, cell.value, color=color, edgecolor="white", hatch=hatch, height=0.8, linewidth=0)
        text = f" {cell.value:.{row.benchmark.digits}f}"
        axes.text(max(cell.value, 0), place, text, va="center", fontsize=8)
    for name, value in row.baseline.items():
        place = next(place for place, (bar, _, _) in enumerate(bars) if bar == name)
        axes.plot([value, value], [place - 0.45, place + 0.45], color="black", linestyle="--", linewidth=1)
    axes.set_yticks(range(len(bars)), [name for name, _, _ in bars], fontsize=8)
    end = row.benchmark.full or longest
    axes.set_xlim(0, 1.25 * end)  # room for the numbers
    axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= 1.001 * end])
    axes.tick_params(axis="x", labelsize=7)
    axes.set_title(row.benchmark.name + (" (lower is better)" if row.benchmark.lower else ""), fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
