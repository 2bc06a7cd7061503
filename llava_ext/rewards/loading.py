"""Rewards by name: entry points of installed packages, or dotted paths."""

import inspect
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from numbers import Real
from typing import Any

from evotok_plugin.errors import UserError
from llava_ext.rewards.protocol import Reward
from llava_ext.rewards.weighted import WeightedRewards

GROUP = "evotok.rewards"  # the group of entry points that packages register rewards in


def load_rewards(spec: str | Mapping[str, float]) -> WeightedRewards:
    """Load rewards with their weights.

    Args:
        spec: weights by name, as a mapping or as text: "NAME", or "NAME=WEIGHT,NAME=WEIGHT". A name is an entry point
            of the group `evotok.rewards`, or the dotted path of a function, a class or an object:
            "package.module:object". A class is instantiated without arguments.

    Raises:
        UserError: a name is unknown or cannot be loaded, or a weight is not a finite number other than 0.
    """
    weights = read_weights(spec)
    return WeightedRewards({name: _load(name) for name in weights}, weights)


def read_weights(spec: str | Mapping[str, float]) -> dict[str, float]:
    """The weights by name that `load_rewards` describes, without loading the rewards.

    Raises:
        UserError: the specification is not of the described form.
    """
    given: dict[str, Any] = dict(spec) if isinstance(spec, Mapping) else _parse(spec)
    if not given:
        raise UserError(f"expected at least one reward, got {spec!r}; known are {_known()}")
    for name, weight in given.items():
        is_number = isinstance(weight, Real) and not isinstance(weight, bool)
        if not isinstance(name, str) or not is_number or not 0 < abs(float(weight)) < float("inf"):
            raise UserError(f"reward {name!r}: expected a finite weight other than 0, got {weight!r}")
    return {name: float(weight) for name, weight in given.items()}


def _parse(text: str) -> dict[str, float]:
    weights: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in str(text).split(","))):
        name, _, number = part.partition("=")
        name = name.strip()
        try:
            weight = float(number) if number.strip() else 1.0
        except ValueError:
            raise UserError(f"reward {name}: expected NAME=WEIGHT with a number, got {part!r}") from None
        if name in weights:
            raise UserError(f"reward {name} is given twice in {text!r}")
        weights[name] = weight
    return weights


def _registered() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def _known() -> str:
    names = ", ".join(sorted(_registered())) or "none (is the project installed?)"
    return f"{names}, or a dotted path such as package.module:function"


def _load(name: str) -> Reward:
    entry = _registered().get(name)
    if entry is None and ":" not in name:
        raise UserError(f"unknown reward {name!r}; known are {_known()}")
    try:
        found = entry.load() if entry is not None else _import(name)
    except UserError:
        raise
    except (ImportError, AttributeError) as error:
        raise UserError(f"reward {name} cannot be loaded: {error}") from error
    reward = found() if inspect.isclass(found) else found
    if not callable(reward):
        raise UserError(f"reward {name}: expected a function (prompts, images) -> scores, got {type(reward).__name__}")
    return reward


def _import(path: str) -> Any:
    module, _, attribute = path.partition(":")
    found: Any = import_module(module)
    for part in attribute.split("."):
        found = getattr(found, part)
    return found
