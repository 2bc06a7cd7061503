"""Settings of a resumed run: a changed one is applied or rejected, or has no influence on the result.

`recipe.yaml` in the output folder has the settings of the last start of a run. Comments at its top list the changes
that were applied on resumption, and from which step.
"""

import hashlib
import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from evotok_plugin.common.files import write_text
from evotok_plugin.common.foreign_files import decoded, read_bytes, read_text
from evotok_plugin.common.recipes import parse_yaml
from evotok_plugin.errors import UserError

logger = logging.getLogger(__name__)

RECIPE = "recipe.yaml"
_NUM_COMPARED = 256  # images
_MAX_CHANGED = 0.1  # fraction of the compared images, such as broken ones that were replaced


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
    """The settings that differ, except those without influence on the result."""
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
    """Reject a resumption with changed settings.

    Args:
        what: the run in the folder: "a run at step 4".

    Raises:
        UserError: there are changes; the message lists them with both values.
    """
    if listed := [str(change) for change in rejected]:
        raise UserError(
            f"{folder} holds {what}, trained with other settings: {'; '.join(listed)}. Pass the same settings to "
            "resume it, choose another --output_dir, or pass --overwrite true to start over"
        )


def sample_contents(content: Callable[[int], bytes], indices: Sequence[int]) -> list[str]:
    """Short digests of the files of up to 256 images, evenly spread; "" for an image that cannot be read.

    Args:
        content: returns the bytes of the image with an index.
    """
    positions = np.linspace(0, len(indices) - 1, min(len(indices), _NUM_COMPARED)).round().astype(int)
    return [_digest_of(content, int(indices[position])) for position in positions]


def _digest_of(content: Callable[[int], bytes], index: int) -> str:
    try:
        return hashlib.sha256(content(index)).hexdigest()[:8]
    except (ValueError, TypeError):  # a broken image, or a row without one
        return ""


def changed_contents(before: Sequence[str] | None, now: Sequence[str]) -> list[Change]:
    """Detect images whose content has changed, by `sample_contents`; a few are logged and tolerated."""
    if before is None or len(before) != len(now):
        return []  # not recorded; another number of images is detected elsewhere
    different = sum(was != digest for was, digest in zip(before, now, strict=True))
    if different <= _MAX_CHANGED * len(now):
        if different:
            logger.warning("%d of %d compared images have changed since the run began", different, len(now))
        return []
    return [Change("images", f"{len(now)} compared", f"{different} of them with other content under the same names")]


def read_recipe(folder: str | Path) -> dict[str, Any] | None:
    """The settings in the `recipe.yaml` of a folder, or None if it cannot be read."""
    try:
        values = parse_yaml(decoded(read_bytes(Path(folder) / RECIPE)))
    except Exception:  # PyYAML raises errors of many types
        return None
    return values if isinstance(values, dict) else None


def recipe_to_compare(folder: str | Path, state: str, is_first: bool = True) -> dict[str, Any] | None:
    """The settings of a run to be resumed; None, with a warning, if `recipe.yaml` is missing.

    Args:
        state: the run in the folder: "a run at step 4".
        is_first: whether this process logs the warning.

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
    """Write `recipe.yaml`; on resumption, with a comment for every setting that changes from `step` on."""
    path = Path(folder) / RECIPE
    before = read_text(path).splitlines() if step and path.is_file() else []
    comments = [line for line in before if line.startswith("# step ")]
    comments += [" ".join(f"# step {step}: {change}".split()) for change in applied]
    write_text(path, "".join(f"{line}\n" for line in comments) + yaml.safe_dump(values, sort_keys=False))
