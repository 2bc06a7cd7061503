"""The rows of the report card and the figures that others have published, both read from `published.yaml`."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import yaml

from evotok_plugin.errors import UserError

_FILE = Path(__file__).with_name("published.yaml")
_ABOUT_FIGURES = ("source", "setting", "differs")


@dataclass(frozen=True, kw_only=True)
class CardRow:
    """A row of the report card: a metric of ours, its published unit, and its comparability with published figures.

    Attributes:
        group: reconstruction, reading or drawing.
        scale: factor from our figure to the published unit.
        full: the best possible figure in the published unit, where there is one.
        lower: whether lower figures are better.
        images, image_size: number and side of the images behind published figures; 0 where they do not matter.
        images_per_prompt: of drawn images, behind published figures; 0 where it does not matter.
        baseline: the task's metric that gives the score of a model without any skill.
        differs: why published figures are never comparable with ours.
    """

    name: str
    group: str
    task: str
    metric: str
    scale: float = 1.0
    digits: int = 1
    full: float | None = None
    lower: bool = False
    images: int = 0
    image_size: int = 0
    images_per_prompt: int = 0
    baseline: str = ""
    differs: str = ""


@dataclass(frozen=True, kw_only=True)
class PublishedFigure:
    """A figure in its row's unit, with its source, the setting it was measured in, and why it is not comparable."""

    value: float
    source: str
    setting: str
    differs: str = ""


@dataclass(frozen=True)
class PublishedModel:
    """The figures of a model, by row name."""

    name: str
    setting: str
    figures: dict[str, PublishedFigure]


def card_rows() -> list[CardRow]:
    """All rows, in order."""
    return [CardRow(**row) for row in yaml.safe_load(_FILE.read_text())["benchmarks"]]


def published(names: Sequence[str] | None = None) -> list[PublishedModel]:
    """The published models, all of them or those of the given names.

    Raises:
        UserError: an unknown name.
    """
    models = {row["name"]: _model(row) for row in yaml.safe_load(_FILE.read_text())["models"]}
    for name in names or ():
        if name not in models:
            near = get_close_matches(name, models, n=1, cutoff=0.0)
            raise UserError(f"no published figures of {name!r}; did you mean {near[0]}? Known: {', '.join(models)}")
    return list(models.values()) if names is None else [models[name] for name in names]


def _model(row: dict) -> PublishedModel:
    figures: dict[str, PublishedFigure] = {}
    for entry in row["figures"]:
        about = {key: entry[key] for key in _ABOUT_FIGURES if key in entry}
        figures |= {name: PublishedFigure(value=value, **about) for name, value in entry.items() if name not in about}
    return PublishedModel(row["name"], row["setting"], figures)
