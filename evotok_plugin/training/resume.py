"""Settings of a run that is resumed: each is applied, rejected when it differs, or without influence on the result.

`recipe.yaml` in the output folder holds the settings that a run was started with. Changes that were applied later are
comments at its top, so that the file never claims what did not happen.
"""

import hashlib
import logging
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from evotok_plugin.errors import UserError

logger = logging.getLogger(__name__)

RECIPE = "recipe.yaml"
_LOOKED_AT = 256
_REPAIRED = 0.1  # share of images that may differ: broken ones that were replaced


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
        UserError: there are changes; the message lists all with both values.
    """
    if listed := [str(change) for change in rejected]:
        raise UserError(
            f"{folder} holds {what}, trained with other settings: {'; '.join(listed)}. Pass the same settings to "
            "resume it, choose another --output_dir, or pass --overwrite true to start over"
        )


def sample_contents(content: Callable[[int], bytes], indices: Sequence[int]) -> list[str]:
    """Short digests of the files of up to 256 images, evenly spread; "" for one that cannot be read.

    Args:
        content: the file of the image of an index.
    """
    places = np.linspace(0, len(indices) - 1, min(len(indices), _LOOKED_AT)).round().astype(int)
    return [_digest_of(content, int(indices[place])) for place in places]


def _digest_of(content: Callable[[int], bytes], index: int) -> str:
    try:
        return hashlib.sha256(content(index)).hexdigest()[:8]
    except (ValueError, TypeError):  # a row without the image
        return ""


def changed_contents(before: Sequence[str] | None, now: Sequence[str]) -> list[Change]:
    """Whether images are others under the same names, by `sample_contents`; a few are reported and tolerated."""
    if before is None or len(before) != len(now):
        return []  # unknown, or the number of images says so
    different = sum(was != digest for was, digest in zip(before, now, strict=True))
    if different <= _REPAIRED * len(now):
        if different:
            logger.warning("%d of %d images looked at have changed since the run began", different, len(now))
        return []
    return [Change("images", f"{len(now)} looked at", f"{different} of them with other content under the same names")]


def read_recipe(folder: str | Path) -> dict[str, Any] | None:
    """The settings that a folder's run was started with, or None without a readable `recipe.yaml`."""
    try:
        values = yaml.safe_load((Path(folder) / RECIPE).read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return None
    return values if isinstance(values, dict) else None


def recipe_to_compare(folder: str | Path, state: str, is_first: bool = True) -> dict[str, Any] | None:
    """The settings that a run to be resumed was started with; None, with a warning, where `recipe.yaml` is missing.

    Args:
        state: the run that the folder holds: "a run at step 4".
        is_first: whether this process warns.

    Raises:
        UserError: `recipe.yaml` is damaged.
    """
    path = Path(folder) / RECIPE
    if not path.exists():
        if is_first:
            logger.warning(
                "%s is missing, so the settings cannot be compared with those of %s; the run is resumed with the "
                "settings given now",
                path,
                state,
            )
        return None
    saved = read_recipe(folder)
    if saved is None:
        raise UserError(
            f"{path} cannot be read as settings, so the settings cannot be compared with those of {state}; restore it, "
            "delete it to resume with the settings given now, or pass --overwrite true to start over"
        )
    return saved


def write_recipe(folder: str | Path, values: dict[str, Any], applied: Iterable[Change] = (), step: int = 0) -> None:
    """Write `recipe.yaml`; on resume, with a comment for every setting that is other from `step` on."""
    path = Path(folder) / RECIPE
    before = path.read_text().splitlines() if step and path.is_file() else []
    comments = [line for line in before if line.startswith("# step ")]
    comments += [" ".join(f"# step {step}: {change}".split()) for change in applied]
    temporary = path.with_name(f".{RECIPE}.tmp")  # a kill in the middle must not leave a damaged file
    temporary.write_text("".join(f"{line}\n" for line in comments) + yaml.safe_dump(values, sort_keys=False))
    os.replace(temporary, path)
