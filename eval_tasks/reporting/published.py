"""The benchmarks of the report card, and what others have published; `published.yaml` beside this file holds both."""

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
    """A row: which figure of ours it shows, in which unit, and what keeps published ones from being compared with it.

    Attributes:
        group: reconstruction, reading or drawing.
        scale: our figure times this has the published unit; `full` is the best possible in it, if there is one.
        images, image_size: what a figure that is comparable was made of; 0 where it does not matter.
        beside: metric that says what no skill scores.
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
    beside: str = ""
    differs: str = ""


@dataclass(frozen=True, kw_only=True)
class PublishedFigure:
    """A figure in the benchmark's unit, where it stands, how it was made, and why it cannot be compared."""

    value: float
    source: str
    setting: str
    differs: str = ""


@dataclass(frozen=True)
class PublishedModel:
    """A model's figures by name of the benchmark."""

    name: str
    setting: str
    figures: dict[str, PublishedFigure]


def card_rows() -> list[CardRow]:
    """All rows, in order."""
    return [CardRow(**row) for row in yaml.safe_load(_FILE.read_text())["benchmarks"]]


def published(names: Sequence[str] | None = None) -> list[PublishedModel]:
    """Published models, all or those that are named.

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
    figures = {}
    for together in row["figures"]:
        about = {key: together[key] for key in _ABOUT_FIGURES if key in together}
        figures |= {
            name: PublishedFigure(value=value, **about) for name, value in together.items() if name not in about
        }
    return PublishedModel(row["name"], row["setting"], figures)
