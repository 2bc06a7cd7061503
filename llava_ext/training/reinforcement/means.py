"""Means of metrics between two log entries, over all processes."""

from collections.abc import Iterable

from evotok_plugin.common.processes import Processes


class Means:
    """Sums and counts by name."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, int]] = {}

    def add(self, name: str, values: Iterable[float]) -> None:
        """Add values to the mean of a metric."""
        values = list(values)
        total, count = self._sums.get(name, (0.0, 0))
        self._sums[name] = total + sum(values), count + len(values)

    def pop(self, processes: Processes) -> dict[str, float]:
        """The means over all processes, which all call this; then start again. Names without values are left out."""
        merged: dict[str, tuple[float, int]] = {}
        for sums in processes.gather(self._sums):
            for name, (total, count) in sums.items():
                before, counted = merged.get(name, (0.0, 0))
                merged[name] = before + total, counted + count
        self._sums = {}
        return {name: round(total / count, 5) for name, (total, count) in merged.items() if count}
