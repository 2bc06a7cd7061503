"""Grids of finite scalar quantization: the chosen factors, and sizes that have none."""

from math import prod

import pytest

from evotok_plugin.errors import UserError
from evotok_plugin.quantizers.fsq_grid import fsq_grid


@pytest.mark.parametrize(
    ("size", "grid"), [(32, [8, 4]), (256, [8, 8, 4]), (1000, [8, 5, 5, 5]), (7, [7]), (9, [3, 3]), (32768, [8] * 5)]
)
def test_a_grid_has_few_dimensions(size, grid):
    assert fsq_grid(size) == grid and prod(grid) == size


def test_the_shortest_of_all_factorizations_is_found():
    for size in range(3, 400):
        try:
            found = fsq_grid(size)
        except UserError:
            assert not reachable(size, 3)
            continue
        assert prod(found) == size and all(3 <= one <= 8 for one in found) and not reachable(size, len(found) - 1)


def reachable(size, count):
    """Whether a size is the product of at most `count` numbers from 3 to 8."""
    products = {1}
    for _ in range(count):
        products |= {product * factor for product in products for factor in range(3, 9)}
    return size in products


def test_given_numbers_are_kept():
    assert fsq_grid(33, [11, 3]) == [11, 3] and fsq_grid(31, [31]) == [31]


@pytest.mark.parametrize(
    ("size", "levels", "message"),
    [
        (31, [], r"codebook_size 31 is not a product of numbers from 3 to 8.*; 30 is, or set fsq_levels"),
        (2, [], "codebook_size 2 is not a product .*; 3 is"),
        (1, [], "codebook_size 1 is not a product .*; 3 is"),
        (32, [8, 8], "product is codebook_size 32, got the product 64"),
        (32, [16, 2], "at least 3"),
    ],
)
def test_impossible_grids(size, levels, message):
    with pytest.raises(UserError, match=message):
        fsq_grid(size, levels)
