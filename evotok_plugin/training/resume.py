"""Settings of a run that is resumed: each is applied, rejected when it differs, or without influence on the result.

`recipe.yaml` in the output folder holds the settings that a run was started with. Changes that were applied later are
comments at its top, so that the file never claims what did not happen.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

RECIPE = "recipe.yaml"


@dataclass(frozen=True)
class Change:
    """A setting that differs from the one that a run was started with."""

    name: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.name}: {_shown(self.before)} before, {_shown(self.now)} now"


def _shown(value: Any) -> str:
    text = "not set" if value is None else str(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def changes(before: dict[str, Any], now: dict[str, Any], irrelevant: Collection[str]) -> list[Change]:
    """Settings that differ, by name, except those without influence on the result."""
    names = [name for name in dict.fromkeys([*before, *now]) if name not in irrelevant]
    pairs = ((name, before.get(name), now.get(name)) for name in names)
    return [Change(name, was, value) for name, was, value in pairs if _comparable(was) != _comparable(value)]


def _comparable(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_comparable(one) for one in value]
    if isinstance(value, bool) or value is None:
        return value
    return float(value) if isinstance(value, (int, float)) else value


def reject(rejected: Iterable[Change], folder: str | Path, what: str) -> None:
    """Refuse a run that would continue with other settings.

    Args:
        what: the run that the folder holds: "a run that is at step 4".

    Raises:
        ValueError: there are changes; the message lists all with both values.
    """
    if listed := [str(change) for change in rejected]:
        raise ValueError(
            f"{folder} holds {what}, trained with other settings: {'; '.join(listed)}. Pass the same settings to "
            "resume it, choose another --output_dir, or pass --overwrite true to begin anew"
        )


def read_recipe(folder: str | Path) -> dict[str, Any] | None:
    """The settings that a folder's run was started with, or None without a readable `recipe.yaml`."""
    try:
        values = yaml.safe_load((Path(folder) / RECIPE).read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return None
    return values if isinstance(values, dict) else None


def write_recipe(folder: str | Path, values: dict[str, Any], applied: Iterable[Change] = (), step: int = 0) -> None:
    """Write `recipe.yaml`; on resume, with a comment for every setting that is other from `step` on."""
    path = Path(folder) / RECIPE
    before = path.read_text().splitlines() if step and path.is_file() else []
    comments = [line for line in before if line.startswith("# step ")]
    comments += [" ".join(f"# step {step}: {change}".split()) for change in applied]
    path.write_text("".join(f"{line}\n" for line in comments) + yaml.safe_dump(values, sort_keys=False))
