"""Sizes of the grids of finite scalar quantization."""

from collections.abc import Sequence
from itertools import count
from math import prod

from evotok_plugin.errors import UserError

_FEWEST, _MOST = 3, 8  # values per dimension of grids that are chosen here


def fsq_grid(codebook_size: int, levels: Sequence[int] = ()) -> list[int]:
    """The number of values in each dimension of a grid of `codebook_size` points.

    Args:
        levels: these numbers; empty: as few dimensions as possible, of 3 to 8 values each.

    Raises:
        UserError: the product of the numbers is not the size, or the size has no such factors.
    """
    if levels:
        if prod(levels) != codebook_size or min(levels) < _FEWEST:
            raise UserError(
                f"fsq_levels {list(levels)}: expected numbers of at least {_FEWEST} whose product is codebook_size "
                f"{codebook_size}, got the product {prod(levels)}"
            )
        return list(levels)
    if found := _factors(codebook_size, _MOST):
        return found
    near = (size for step in count(1) for size in (codebook_size - step, codebook_size + step))
    fitting = next(size for size in near if _factors(size, _MOST))
    raise UserError(
        f"codebook_size {codebook_size} is not a product of numbers from {_FEWEST} to {_MOST}, so a grid of finite "
        f"scalar quantization cannot have this size; {fitting} is, or set fsq_levels"
    )


def _factors(size: int, most: int) -> list[int] | None:
    """The shortest list of factors from `_FEWEST` to `most`, the largest first; None if there is none."""
    if _FEWEST <= size <= most:
        return [size]
    best: list[int] | None = None
    for factor in range(min(most, size), _FEWEST - 1, -1):
        if size % factor == 0 and size > factor and (rest := _factors(size // factor, factor)):
            if best is None or len(rest) + 1 < len(best):
                best = [factor, *rest]
    return best
