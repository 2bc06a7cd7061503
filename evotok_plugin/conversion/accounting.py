"""Conversion of weights between naming schemes and layouts, with an account of every key."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from evotok_plugin.errors import UserError

_SHOWN = 20  # maximum number of names listed in an error


def _only(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0]


@dataclass(frozen=True)
class Source:
    """Origin of one of our tensors.

    Attributes:
        names: keys in the research checkpoint.
        shape: the shape that each of them must have.
        build: builds our tensor from theirs.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    build: Callable[[Sequence[Tensor]], Tensor] = _only


@dataclass(frozen=True)
class Converted:
    """Weights under our names in float32, and the number of research keys left out for each reason."""

    state: dict[str, Tensor]
    bookkeeping: Counter[str]


def convert_weights(
    weights: Mapping[str, Tensor], sources: Mapping[str, Source], bookkeeping: Mapping[str, str]
) -> Converted:
    """Build our tensors from research weights and account for every key.

    Args:
        sources: for each of our names its origin.
        bookkeeping: regular expressions that match complete research keys without a role in the forward pass -> the
            reason for leaving them out.

    Raises:
        UserError: keys that are missing, unknown or of another shape; all of them are listed.
    """
    needed = {name: source.shape for source in sources.values() for name in source.names}
    spare: Counter[str] = Counter()
    unknown = []
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
        f"{len(names)} {what}: {join_names(sorted(names))}"
        for what, names in (("missing", missing), ("unknown", unknown), ("of another shape", misshapen))
        if names
    ]
    if problems:
        raise UserError(f"the checkpoint's keys do not match the research layout; {'; '.join(problems)}")
    # Every tensor is copied: parts of one research tensor must not share memory when they are saved.
    build = {name: source.build([weights[part] for part in source.names]) for name, source in sources.items()}
    return Converted({name: tensor.float().contiguous().clone() for name, tensor in build.items()}, spare)


def join_names(names: Sequence[str], shown: int = _SHOWN) -> str:
    """Join names by commas; after the first `shown` names only the number of the remaining ones is given."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def rename(name: str, rules: Iterable[tuple[str, str]]) -> str:
    """Apply rules (regular expression, replacement) to a name, one after another."""
    for ours, theirs in rules:
        name = re.sub(ours, theirs, name)
    return name


class Shapes:
    """Shapes of a checkpoint's tensors, from which model sizes are inferred.

    Raises:
        UserError: a tensor is missing or has another number of dimensions.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._weights = weights

    def require(self, names: Iterable[str]) -> None:
        """Check that tensors exist; the error lists all missing ones."""
        missing = [name for name in names if name not in self._weights]
        if missing:
            raise UserError(f"the checkpoint's sizes cannot be read; {len(missing)} missing: {join_names(missing)}")

    def of(self, name: str, num_dims: int) -> tuple[int, ...]:
        """Return the shape of a tensor with `num_dims` dimensions."""
        self.require([name])
        shape = tuple(self._weights[name].shape)
        if len(shape) != num_dims or 0 in shape:
            raise UserError(
                f"the checkpoint's sizes cannot be read; {name} is {shape}, expected {num_dims} dimensions, none empty"
            )
        return shape

    def count(self, before: str, after: str = ".") -> int:
        """Return the highest index i in names of the form `before`i`after`..., plus one."""
        pattern = re.compile(rf"{re.escape(before)}(\d+){re.escape(after)}")
        found = [int(match[1]) for name in self._weights if (match := pattern.match(name))]
        return max(found, default=-1) + 1


def conventional_heads(width: int, option: str) -> int:
    """Number of heads by convention: of 64 dimensions, except for SigLIP's so400m (width 1152), which has 16 of 72.

    Args:
        option: the flag that sets the number of heads, for the error message.

    Raises:
        UserError: the width is not a multiple of 64.
    """
    if width == 1152:
        return 16
    if width % 64:
        raise UserError(
            f"the number of heads cannot be inferred from the width {width}, which is not a multiple of 64; set it "
            f"with {option}"
        )
    return width // 64
