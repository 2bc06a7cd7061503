"""Weights of one naming and layout to another, with an account of every name that came and went."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from evotok_plugin.errors import UserError

_SHOWN = 20  # names an error lists before it says how many more there are


def _only(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0]


@dataclass(frozen=True)
class Source:
    """Where one of our tensors comes from: `names` in the research checkpoint, the `shape` of each, and how one tensor
    is built of them."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    build: Callable[[Sequence[Tensor]], Tensor] = _only


@dataclass(frozen=True)
class Converted:
    """Weights under our names in float32, and how many research keys each reason left out."""

    state: dict[str, Tensor]
    bookkeeping: Counter[str]


def convert_weights(
    weights: Mapping[str, Tensor], sources: Mapping[str, Source], bookkeeping: Mapping[str, str]
) -> Converted:
    """Build our tensors from research weights and account for every key.

    Args:
        sources: for every name of ours where it comes from.
        bookkeeping: regular expressions of whole research names that have no part in the forward pass -> the reason.

    Raises:
        UserError: keys that are missing, unknown or of another shape, each of them listed.
    """
    needed = {name: source.shape for source in sources.values() for name in source.names}
    spare, unknown = Counter(), []
    for name in weights.keys() - needed.keys():
        reason = next((why for pattern, why in bookkeeping.items() if re.fullmatch(pattern, name)), None)
        if reason is None:
            unknown.append(name)
        else:
            spare[reason] += 1
    missing = [name for name in needed if name not in weights]
    misshapen = [
        f"{name} is {tuple(weights[name].shape)}, expected {shape}"
        for name, shape in needed.items()
        if name in weights and tuple(weights[name].shape) != shape
    ]
    problems = [
        f"{len(names)} {what}: {_listed(sorted(names))}"
        for what, names in (("missing", missing), ("unknown", unknown), ("of another shape", misshapen))
        if names
    ]
    if problems:
        raise UserError(f"the checkpoint's keys do not fit the research layout; {'; '.join(problems)}")
    # A copy each: pieces of one research tensor must not share memory when they are saved.
    build = {name: source.build([weights[part] for part in source.names]) for name, source in sources.items()}
    return Converted({name: tensor.float().contiguous().clone() for name, tensor in build.items()}, spare)


def _listed(names: Sequence[str], shown: int = _SHOWN) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def rename(name: str, rules: Iterable[tuple[str, str]]) -> str:
    """A name after all rules (regular expression, replacement), each applied in turn."""
    for ours, theirs in rules:
        name = re.sub(ours, theirs, name)
    return name


class Shapes:
    """Shapes of a checkpoint, from which sizes are inferred.

    Raises:
        UserError: a tensor that is not there, or has another number of dimensions.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._weights = weights

    def require(self, names: Iterable[str]) -> None:
        """Name all that are missing at once."""
        missing = [name for name in names if name not in self._weights]
        if missing:
            raise UserError(f"the checkpoint's sizes cannot be read; {len(missing)} missing: {_listed(missing)}")

    def of(self, name: str, num_dims: int) -> tuple[int, ...]:
        """Shape of a tensor."""
        self.require([name])
        shape = tuple(self._weights[name].shape)
        if len(shape) != num_dims or 0 in shape:
            raise UserError(
                f"the checkpoint's sizes cannot be read; {name} is {shape}, expected {num_dims} dimensions, none empty"
            )
        return shape

    def count(self, before: str, after: str = ".") -> int:
        """How many indices i stand in names `before`i`after`...: the highest plus one."""
        pattern = re.compile(rf"{re.escape(before)}(\d+){re.escape(after)}")
        found = [int(match[1]) for name in self._weights if (match := pattern.match(name))]
        return max(found, default=-1) + 1


def conventional_heads(width: int, option: str) -> int:
    """Heads of 64 dimensions; SigLIP's so400m (1152) has 16 of 72.

    Raises:
        UserError: the width is no multiple of 64, so `option` must say it.
    """
    if width == 1152:
        return 16
    if width % 64:
        raise UserError(f"width {width} is no multiple of 64, so the number of heads is not known; pass {option}")
    return width // 64
