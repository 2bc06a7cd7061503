"""Compare the fused search with a float64 search, and measure its time.

    python scripts/gpu/search_kernel.py --device cuda --json search_kernel.json
    TRITON_INTERPRET=1 python scripts/gpu/search_kernel.py --device cpu --json search_kernel.json

Exactness: every code of every case is compared with all codes of its level in float64, for the fused kernel and for the
search without Triton. Time, only on a GPU: both searches and the bare matrix products of an exhaustive search, at the
paper's sizes (16 levels of 32768 codes in 32 dimensions), and the kernel with other launch configurations. The file is
rewritten after every step, so a stopped run leaves what it has measured.
"""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmark"))
from measuring import device_name, peak_mebibytes

from evotok_plugin import code_search
from evotok_plugin.common.command_parser import CommandParser
from evotok_plugin.kernels import residual_search

Search = Callable[[Tensor, Tensor], Tensor]
LEVELS, SIZE, DIM, POSITIONS = 16, 32768, 32, 256
# BLOCK_M, BLOCK_K and warps of other launches.
LAUNCHES = ((128, 128, 8), (64, 64, 4), (64, 128, 4), (32, 128, 4))


def without_triton(latents: Tensor, codebooks: Tensor) -> Tensor:
    """The search by PyTorch's matrix products."""
    with mock.patch.object(code_search, "_kernel", lambda: None):
        return code_search.residual_codes(latents, codebooks)


def wrong_codes(codes: Tensor, vectors: Tensor, codebooks: Tensor) -> int:
    """Count the codes (M, L) with a nearer code, up to float64 rounding, for the residual of the levels before."""
    residual, wrong = vectors.double(), 0
    for level, codebook in enumerate(codebooks.double()):
        chosen = codes[:, level]
        for rows in torch.arange(len(residual), device=residual.device).split(256):
            distances = torch.cdist(residual[rows], codebook, compute_mode="donot_use_mm_for_euclid_dist")
            taken = distances.gather(1, chosen[rows, None])[:, 0]
            wrong += int((taken > distances.amin(dim=1) * (1 + 1e-12)).sum())
        residual = residual - codebook[chosen]
    return wrong


def tied_codebook(size: int, dim: int, spread: int) -> tuple[Tensor, Tensor]:
    """Vectors, and codes that differ by a few units in the last place, too close for float32."""
    codebook = (torch.randn(5, dim) + 30)[torch.arange(size) % 5]
    codebook = codebook * (1 + 2.0**-22 * torch.randint(-spread, spread + 1, codebook.shape))
    count = min(size, 500)
    return codebook[torch.randperm(size)[:count]] + 1e-3 * torch.randn(count, dim), codebook[None]


def cases(large: bool) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, vectors (M, C) and codebooks (L, K, C) of every case."""
    torch.manual_seed(0)
    levels, size, dim, count = (LEVELS, SIZE, DIM, 8 * POSITIONS) if large else (2, 200, 32, 40)
    shrinking = torch.randn(levels, size, dim) * 0.7 ** torch.arange(levels)[:, None, None]
    yield "random", torch.randn(count, dim), shrinking
    yield "one vector", torch.randn(1, dim), shrinking
    yield "near codes", shrinking[0, torch.randint(size, (count,))] + 1e-3 * torch.randn(count, dim), shrinking
    yield "bfloat16 vectors", torch.randn(count, dim).bfloat16(), shrinking
    odd = 4099 if large else 131
    yield "odd sizes", torch.randn(300 if large else 33, 6), torch.randn(3, odd, 6)
    for scale in (1e-6, 1e6):
        codebooks = scale * torch.randn(2, odd, 8)
        codebooks[:, ::7] *= 1e3  # distant codes
        yield f"codes times {scale:g}", torch.randn(60, 8), codebooks
    yield "nearly tied", *tied_codebook(4000 if large else 150, 16, 4)
    yield "nearly tied in all tiles", *tied_codebook(4000 if large else 150, 8, 9)
    copies = torch.randn(9, 8)[torch.randint(9, (odd,))]
    yield "equal codes", torch.randn(40, 8), copies[None]


@contextlib.contextmanager
def low_precision(device: torch.device) -> Iterator[None]:
    """Allow TF32 and autocast to bfloat16, which must not change the codes."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def exactness(device: torch.device) -> Iterator[dict]:
    """One result per search and case."""
    searches: dict[str, Search] = {"fused kernel": residual_search.residual_codes, "without Triton": without_triton}
    for case, vectors, codebooks in cases(large=device.type == "cuda"):
        vectors, codebooks = vectors.to(device), codebooks.to(device)
        for name, search in searches.items():
            with low_precision(device):
                codes = search(vectors, codebooks)
            wrong = wrong_codes(codes, vectors, codebooks)
            yield {"search": name, "case": case, "codes": codes.numel(), "wrong": wrong}
    broken = torch.zeros(4, 8, device=device)
    broken[0], broken[1], broken[2, 3] = torch.nan, torch.inf, -torch.inf
    for name, search in searches.items():
        codes = search(broken, torch.randn(2, 70, 8, device=device))
        outside = int(((codes < 0) | (codes >= 70)).sum())
        yield {"search": name, "case": "not finite, codes in range", "codes": codes.numel(), "wrong": outside}


def milliseconds(run: Callable[[], object], rounds: int = 10) -> tuple[float, float]:
    """Minimum and median time of a call on the GPU."""
    for _ in range(2):
        run()
    times = []
    for _ in range(rounds):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return min(times), sorted(times)[len(times) // 2]


def products(z: Tensor, codebooks: Tensor) -> None:
    """Only the matrix products of an exhaustive search, in blocks."""
    for codebook in codebooks:
        for block in z.split(8192):
            block @ codebook.T


def timed(name: str, images: int, codebooks: Tensor, run: Callable[[], object], device: torch.device) -> dict:
    """Time, rate and additional memory of one search."""
    least, median = milliseconds(run)
    operations = 2 * images * POSITIONS * codebooks.numel()
    return {
        "search": name,
        "images": images,
        "milliseconds": round(least, 3),
        "median_milliseconds": round(median, 3),
        "teraflop_per_second": round(operations / least / 1e9, 2),
        "peak_mebibytes": round(peak_mebibytes(run, device), 1),
    }


def times(device: torch.device) -> Iterator[dict]:
    """Times on a GPU, at the paper's sizes."""
    torch.manual_seed(0)
    codebooks = torch.randn(LEVELS, SIZE, DIM, device=device)
    for images in (1, 8, 64, 256):
        z = torch.randn(images * POSITIONS, DIM, device=device)
        expected = residual_search.residual_codes(z, codebooks)
        same = torch.equal(without_triton(z, codebooks), expected)
        runs = {"fused kernel": residual_search.residual_codes, "without Triton": without_triton}
        for name, search in {**runs, "matrix products, float32": products}.items():
            result = timed(name, images, codebooks, partial(search, z, codebooks), device)
            yield {**result, "same_codes": same}
        for block_m, block_k, warps in LAUNCHES if images in (1, 64) else ():
            with mock.patch.multiple(residual_search, BLOCK_M=block_m, BLOCK_K=block_k, NUM_WARPS=warps):
                same = torch.equal(residual_search.residual_codes(z, codebooks), expected)
                name = f"fused kernel, {block_m} x {block_k}, {warps} warps"
                run = partial(residual_search.residual_codes, z, codebooks)
                yield {**timed(name, images, codebooks, run, device), "same_codes": same}


def main() -> None:
    """Check and measure; the exit code says nothing about exactness, the file does."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="cpu needs TRITON_INTERPRET=1")
    parser.add_argument("--json", type=Path, required=True, help="file for the results")
    options = parser.parse_args()
    device = torch.device(options.device)
    report = {"device": device_name(device), "torch": torch.__version__, "exactness": [], "times": []}
    steps = {"exactness": exactness(device), **({"times": times(device)} if device.type == "cuda" else {})}
    with torch.no_grad():
        for kind, results in steps.items():
            for result in results:
                print(result, flush=True)
                report[kind].append(result)
                options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
