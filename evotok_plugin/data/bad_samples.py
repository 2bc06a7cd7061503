"""Unusable samples: counted, written to a report and limited in number."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from evotok_plugin.common.files import write_text, writing
from evotok_plugin.errors import UserError

_SHOWN = 100  # characters of a user's value in a message


def shorten(value: object, limit: int = _SHOWN) -> str:
    """Quote a user's value for a message: its `repr`, cut to about `limit` characters."""
    if isinstance(value, (str, bytes)) and len(value) > limit:
        return f"{value[:limit]!r}... ({len(value)} {'characters' if isinstance(value, str) else 'bytes'})"
    text = repr(value)
    return text if len(text) <= 2 * limit else f"{text[:limit]}... ({len(text)} characters)"


@dataclass
class BadSamples:
    """Collector of unusable samples that writes a report and raises an error if there are too many.

    Attributes:
        report: file to write, one JSON object per line; None for no report.
        limit: largest tolerated fraction of unusable samples.
        reasons: why each sample is unusable, by name.
    """

    report: Path | None
    limit: float = 0.001
    reasons: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, reason: str) -> None:
        self.reasons[name] = reason

    def write(self, report: Path) -> None:
        """Write one line of JSON per sample.

        Raises:
            UserError: the report cannot be written.
        """
        lines = (json.dumps({"sample": name, "reason": why}) for name, why in self.reasons.items())
        with writing(report):
            report.parent.mkdir(parents=True, exist_ok=True)
        write_text(report, "\n".join(lines) + "\n")

    def check(self, total: int) -> None:
        """Write the report if there are unusable samples.

        Raises:
            UserError: they are more than `limit` times `total`.
        """
        if not self.reasons:
            return
        if self.report is not None:
            self.write(self.report)
        if len(self.reasons) > self.limit * total:
            name, why = next(iter(self.reasons.items()))
            where = f"; all are listed in {self.report}" if self.report else ""
            raise UserError(
                f"{len(self.reasons)} of {total} samples are unusable, over the limit of {self.limit:.2%} "
                f"(--max_bad_fraction). First: {name}: {why}{where}"
            )
