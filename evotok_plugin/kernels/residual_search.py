"""The residual search as one fused Triton kernel per level: search, gather and residual update; scores stay on chip.

M vectors, L levels, K codes per level, C dimensions. Requires Triton. `evotok_plugin.code_search` explains why the
result is exact, and uses this module for latents on a GPU if it can be imported.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton evaluates the annotations of a kernel's parameters, so only constexpr ones have any.

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

if int(triton.__version__.split(".")[0]) < 3:
    raise ImportError(f"the fused search requires Triton 3 or newer, found {triton.__version__}")

BLOCK_M, BLOCK_K, NUM_WARPS = 128, 64, 8


@triton.jit
def _rank_tile(
    vectors, codebook, tile, wanted, distance, code, K, C: tl.constexpr, PADDED_C: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Compare the wanted float64 vectors with the codes of one tile each, updating their nearest distance and code."""
    columns = tl.arange(0, PADDED_C)[None, :]
    for place in range(BLOCK_K):
        index = tile * BLOCK_K + place
        valid = wanted & (index < K)
        mask = valid[:, None] & (columns < C)
        codes = tl.load(codebook + index[:, None] * C + columns, mask=mask, other=0.0).to(tl.float64)
        difference = vectors - codes
        found = tl.sum(difference * difference, axis=1)
        better = valid & ((found < distance) | ((found == distance) & (index < code)))
        distance = tl.where(better, found, distance)
        code = tl.where(better, index, code)
    return distance, code


@triton.jit
def _scores(
    vectors, codebook, bias, tile, K,
    C: tl.constexpr, PADDED_C: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Computed scores of all vectors of the block for a tile of codes (BLOCK_M, BLOCK_K)."""
    index = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    columns = tl.arange(0, PADDED_C)
    mask = (columns < C)[:, None] & (index < K)[None, :]
    codes = tl.load(codebook + index[None, :] * C + columns[:, None], mask=mask, other=0.0)
    products = tl.dot(vectors, codes, input_precision=PRECISION)
    return products + tl.load(bias + index, mask=index < K, other=-float("inf"))[None, :]


@triton.jit
def search_level(
    residual_pointer, codebook, bias, slack_pointer, codes_pointer, M, K,
    C: tl.constexpr, PADDED_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, PADDED_C)[None, :]
    places = residual_pointer + rows[:, None] * C + columns
    mask = (rows < M)[:, None] & (columns < C)
    vectors = tl.load(places, mask=mask, other=0.0).to(tl.float32)

    # The maximum of every tile of codes: the best two tiles, and the maximum of the third.
    first = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    second = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    third = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    first_tile = tl.zeros((BLOCK_M,), tl.int32)
    second_tile = tl.zeros((BLOCK_M,), tl.int32)
    num_tiles = tl.cdiv(K, BLOCK_K)
    for tile in range(num_tiles):
        top = tl.max(_scores(vectors, codebook, bias, tile, K, C, PADDED_C, BLOCK_K, PRECISION), axis=1)
        is_first = top > first
        is_second = top > second
        third = tl.where(is_second, second, tl.maximum(third, top))
        second_tile = tl.where(is_first, first_tile, tl.where(is_second, tile, second_tile))
        second = tl.where(is_first, first, tl.where(is_second, top, second))
        first_tile = tl.where(is_first, tile, first_tile)
        first = tl.where(is_first, top, first)

    exact = tl.load(places, mask=mask, other=0.0)
    distance = tl.full((BLOCK_M,), float("inf"), tl.float64)
    code = tl.full((BLOCK_M,), 2147483647, tl.int32)
    everyone = rows < M
    distance, code = _rank_tile(exact, codebook, first_tile, everyone, distance, code, K, C, PADDED_C, BLOCK_K)
    norms = tl.sum(exact * exact, axis=1)
    least = (norms - distance) * 0.5 - tl.load(slack_pointer) * norms
    near = everyone & (second.to(tl.float64) >= least)
    if tl.max(near.to(tl.int32), axis=0) > 0:
        distance, code = _rank_tile(exact, codebook, second_tile, near, distance, code, K, C, PADDED_C, BLOCK_K)
    near = everyone & (third.to(tl.float64) >= least)
    if tl.max(near.to(tl.int32), axis=0) > 0:  # rare: another pass over all codes
        for tile in range(num_tiles):
            top = tl.max(_scores(vectors, codebook, bias, tile, K, C, PADDED_C, BLOCK_K, PRECISION), axis=1)
            wanted = near & (top.to(tl.float64) >= least) & (tile != first_tile) & (tile != second_tile)
            if tl.max(wanted.to(tl.int32), axis=0) > 0:
                tiles = tl.zeros((BLOCK_M,), tl.int32) + tile
                distance, code = _rank_tile(exact, codebook, tiles, wanted, distance, code, K, C, PADDED_C, BLOCK_K)

    code = tl.where(code < K, code, 0)  # a vector that is not finite has no nearest code
    tl.store(codes_pointer + rows, code.to(tl.int64), mask=rows < M)
    chosen = tl.load(codebook + code[:, None] * C + columns, mask=mask, other=0.0).to(tl.float64)
    tl.store(places, exact - chosen, mask=mask)


def relative_error(dim: int, precision: str) -> float:
    """Largest error of a computed score relative to |x||c|, for an `input_precision` of tl.dot."""
    if precision == "ieee":
        return (dim + 4) * 2.0**-24
    # tf32x3: each factor is split into two numbers truncated to 11 bits; the product of the two smaller parts is left
    # out; 3 C products are summed with truncation to 24 bits.
    return 4 * 2.0**-20 + (3 * dim + 8) * 2.0**-23


def _precision(latents: Tensor) -> str:
    if not latents.is_cuda or torch.version.hip or torch.cuda.get_device_capability(latents.device)[0] < 8:
        return "ieee"
    return "tf32x3"


def residual_codes(latents: Tensor, codebooks: Tensor) -> Tensor:
    """Level by level the code nearest to the residual of the levels before: (M, C), (l, K, C) -> (M, l)."""
    (num_vectors, dim), (levels, size, _) = latents.shape, codebooks.shape
    precision = _precision(latents)
    error = relative_error(dim, precision)
    residual = latents.double().contiguous()
    if residual.data_ptr() == latents.data_ptr():
        residual = residual.clone()
    codes = torch.empty(levels, num_vectors, dtype=torch.long, device=latents.device)
    if not num_vectors:
        return codes.T.contiguous()
    on_device = torch.cuda.device(latents.device) if latents.is_cuda else contextlib.nullcontext()
    with on_device, torch.autocast(latents.device.type, enabled=False):
        for level, codebook in enumerate(codebooks.float().contiguous()):
            half_norms = codebook.square().sum(dim=1) / 2
            balance = (residual.square().sum(dim=1).mean() / (2 * half_norms.double().mean())).sqrt()
            balance = torch.where((balance > 1e-12) & (balance < 1e12), balance, 1.0)
            bias = (half_norms * (error * (balance + 2) - 1)).float()
            search_level[(triton.cdiv(num_vectors, BLOCK_M),)](
                residual, codebook, bias, error / (2 * balance), codes[level], num_vectors, size,
                C=dim, PADDED_C=max(triton.next_power_of_2(dim), 16), BLOCK_M=BLOCK_M, BLOCK_K=BLOCK_K,
                PRECISION=precision, num_warps=NUM_WARPS,
            )  # fmt: skip
    return codes.T.contiguous()
