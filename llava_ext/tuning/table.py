"""Tables of results: settings by skills, in Markdown."""

import math
from collections.abc import Sequence

from llava_ext.tuning.scores import Result

_NO_SKILL = "images without a tag"


def as_cells(results: Sequence[Result]) -> list[list[str]]:
    """Header and one row per result: settings, images, mean score by skill, overall score with its standard error."""
    skills = list(dict.fromkeys(tag for result in results for tag in result.tags))
    head = ["settings", "images", *(skill or _NO_SKILL for skill in skills), "overall"]
    return [head, *(_row(result, skills) for result in results)]


def as_table(results: Sequence[Result]) -> str:
    """The cells of `as_cells` in Markdown."""
    rows = as_cells(results)
    head = rows[0]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    rule = ["-" * widths[0], *(f"{'-' * (width - 1)}:" for width in widths[1:])]
    return "\n".join(_line(row, widths) for row in (head, rule, *rows[1:]))


def _row(result: Result, skills: Sequence[str]) -> list[str]:
    means = result.skills
    by_skill = [f"{means[skill]:.3f}" if skill in means else "-" for skill in skills]
    error = "" if math.isnan(result.standard_error) else f" ± {result.standard_error:.3f}"
    return [result.candidate.name, str(len(result.scores)), *by_skill, f"{result.overall:.3f}{error}"]


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = zip(row, widths, strict=True)
    cells = [first[0].ljust(first[1]), *(text.rjust(width) for text, width in others)]
    return f"| {' | '.join(cells)} |"
