"""The largest score of every group of codes, computed in bfloat16 on CPUs with instructions for it.

Products in bfloat16 take about half the time of those in float32 (AVX-512 BF16, AMX). They cannot decide which code is
the nearest, but exclude nearly all groups of codes: as in `evotok_plugin.code_search`, a computed score is never below
the true score minus a slack of the vector, because each code's bias is raised by the error that its score can have.

Let x', c' be x, c rounded to bfloat16. Then |x.c - x'.c'| <= |x - x'| |c| + |x'| |c - c'|, where both differences are
computed, not estimated, and each product is split into a part of the vector and one of the code by
a b <= (a^2 / t + t b^2) / 2. Products are accumulated in float32, which adds the error of a float32 search. The result
is rounded to bfloat16; rounding never changes the order of two numbers, so a bound is rounded in the same way.

Integers that are ordered as the numbers are seven times as fast to compare on a CPU: see `keys`. The bits of numbers
that are not negative are such integers; usually all maxima that matter belong to them.

V vectors, C dimensions.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_BIASES = 2  # additional coordinates: the bias, and what its rounding has left
_ROUNDED_TWICE = 1.02  # (1 + 2**-8)**2, rounded up: |x'| <= (1 + 2**-8) |x|
_RAISED = 1.00001  # above the rounding errors of the sums over the dimensions
_UNIT_ROUNDOFF = 2.0**-24
_TINY = 1e-25  # above the absolute error of products that the CPU flushes to zero, for vectors in `_RANGE`
_RANGE = (1e-12, 1e12)  # of mean squares
_CODES_AT_ONCE = 4096  # prepared together, in the cache
LOWEST = -(2**15)  # below the keys of all numbers


def can_use_bfloat16(like: Tensor) -> bool:
    """Whether the CPU has instructions for products in bfloat16, and PyTorch uses them."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return (
        like.device.type == "cpu"
        and like.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and getattr(torch.backends.mkldnn, "enabled", True)
        and any(getattr(torch.cpu, name, bool)() for name in names)
    )


def keys(scores: Tensor) -> Tensor:
    """Integers in the order of bfloat16 numbers of any shape; -0 and 0 differ."""
    bits = scores.view(torch.int16)
    return torch.where(bits >= 0, bits, bits ^ 0x7FFF)


@dataclass(frozen=True)
class _Block:
    """Views of the memory for a block of codes and the vectors of a product."""

    codes: Tensor  # (codes, C + biases)
    scores: Tensor  # (codes, V)
    groups: Tensor  # the bits of the scores, (groups, codes per group, V)
    largest: Tensor  # (groups, V)
    smallest: Tensor  # (groups, V)


class HalfMaxima:
    """The maxima in bfloat16, and their work memory.

    Attributes:
        squares: of the codes of this level, summed over their coordinates, (K,).
        signed: whether keys below 0 are right, which takes another pass over the scores. At first they are not, and
            valid only as "some number below 0".

    Args:
        num_groups, group_size: groups of codes; the last one may have fewer codes than `group_size`.
        groups_at_once, num_vectors: of one product.
        padded: at least `num_groups`; the keys of the missing groups are `LOWEST`.
    """

    def __init__(
        self, size: int, dim: int, num_groups: int, group_size: int, padded: int, groups_at_once: int, num_vectors: int
    ) -> None:
        self._group_size, self._at_once, self._size = group_size, groups_at_once, size
        self._blocks: list[_Block] = []
        # On the CPU even if PyTorch's default device is another one.
        half: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cpu"}
        integers: dict[str, Any] = {"dtype": torch.int16, "device": "cpu"}
        self._codes = torch.zeros(num_groups * group_size, dim + _BIASES, **half)
        self._codes[size:, dim] = -torch.inf
        self._scores = torch.empty(groups_at_once * group_size * num_vectors, **half)
        self._largest = torch.full((padded, num_vectors), LOWEST, **integers)
        self._smallest = torch.full((padded, num_vectors), -1, **integers)  # of the missing groups: LOWEST
        self._work = torch.empty(min(size, _CODES_AT_ONCE), dim, dtype=torch.float32, device="cpu")
        self._lost = torch.empty(size, dtype=torch.float32, device="cpu")
        self.squares = torch.empty_like(self._lost)
        self.signed = False
        self._error = _ROUNDED_TWICE * (dim + 2 * _BIASES + 4) * _UNIT_ROUNDOFF

    def start(self, vectors: Tensor, codebook: Tensor) -> bool:
        """Prepare a level: the vectors (M, C) of all blocks, and its codes (K, C).

        Returns:
            Whether the numbers are far from the limits of the format; NaN is not. If they are not, compute in float32.
        """
        dim = codebook.shape[1]
        lost, squares = self._lost, self.squares
        for first in range(0, self._size, _CODES_AT_ONCE):
            part = slice(first, first + _CODES_AT_ONCE)
            codes, rounded = codebook[part], self._codes[: self._size, :dim][part]
            work = self._work[: len(codes)]
            work.copy_(rounded.copy_(codes)).sub_(codes).square_()
            torch.sum(work, dim=1, out=lost[part])
            torch.sum(torch.mul(codes, codes, out=work), dim=1, out=squares[part])
        vector_lost, vector_squares = self._squares(vectors)
        vector_mean, mean = float(vector_squares.mean()), float(squares.mean())
        if not all(_RANGE[0] < one / dim < _RANGE[1] for one in (vector_mean, mean)):
            return False
        # Any positive numbers are valid; these make the parts of vectors and codes equal in the mean.
        self._balance = (vector_mean / mean) ** 0.5
        self._of_vectors = max(float(vector_lost.mean()) / mean, 2.0**-24 * vector_mean / mean) ** 0.5
        self._of_codes = max(float(lost.mean()) / vector_mean, 2.0**-24 * mean / vector_mean) ** 0.5
        raised = squares * ((self._error * (self._balance + 2) - 1) / 2 + _RAISED * self._of_vectors / 2)
        raised.add_(lost, alpha=_RAISED / (2 * self._of_codes))
        bias = self._codes[: self._size, dim]
        bias.copy_(raised)
        left = (raised - bias.float()).bfloat16()
        self._codes[: self._size, dim + 1] = torch.nextafter(left, left.new_tensor(torch.inf))
        return True

    def of_block(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the maxima for a block of float64 vectors (V, C).

        Returns:
            The keys (padded, V) of the largest scores of every group, and the slack (V,) of every vector.
        """
        num_vectors, dim = vectors.shape
        columns = self._codes.new_ones(dim + _BIASES, num_vectors)
        columns[:dim] = vectors.T
        lost, squares = self._squares(vectors)
        slack = lost / (2 * self._of_vectors) + squares * (self._of_codes / 2 + self._error / (2 * self._balance))
        return self._maxima(columns), slack + _TINY

    def _maxima(self, columns: Tensor) -> Tensor:
        num_vectors = columns.shape[1]
        if not self._blocks or self._blocks[0].scores.shape[1] != num_vectors:
            self._blocks = self._cut_blocks(num_vectors)
        for block in self._blocks:
            torch.mm(block.codes, columns, out=block.scores)
            torch.amax(block.groups, dim=1, out=block.largest)
            if self.signed:
                torch.amin(block.groups, dim=1, out=block.smallest)
        largest = self._largest[:, :num_vectors]
        if self.signed:
            # If a group has only negative numbers, the largest has the smallest bits.
            return torch.where(largest >= 0, largest, self._smallest[:, :num_vectors] ^ 0x7FFF)
        return largest

    def _cut_blocks(self, num_vectors: int) -> list[_Block]:
        """Views of all blocks of codes, cut once for all levels: it takes as long as a part of the products."""
        blocks = []
        for number, codes in enumerate(self._codes.split(self._at_once * self._group_size)):
            scores = self._scores[: len(codes) * num_vectors].view(len(codes), num_vectors)
            groups = scores.view(torch.int16).view(-1, self._group_size, num_vectors)
            part = slice(number * self._at_once, number * self._at_once + len(groups))
            largest, smallest = self._largest[part, :num_vectors], self._smallest[part, :num_vectors]
            blocks.append(_Block(codes, scores, groups, largest, smallest))
        return blocks

    @staticmethod
    def bounds(least: Tensor) -> Tensor:
        """Keys (V,) that every score of at least `least` (V,) reaches once it is rounded."""
        found = keys(least.bfloat16())
        return found - 1  # in case a CPU rounds otherwise than PyTorch

    @staticmethod
    def _squares(vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Squares of what rounding changes in each vector, and of the rounded vectors, in float64: (V,) both."""
        rounded = vectors.bfloat16().double()
        return (vectors - rounded).square_().sum(dim=1), rounded.square().sum(dim=1)
