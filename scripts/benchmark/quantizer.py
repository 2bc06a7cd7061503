"""Compare the residual quantizer with the bare matrix products and with vector-quantize-pytorch in time and memory.

    python scripts/benchmark/quantizer.py --images 1 8 --json quantizer.json

The lower bound ("floor") is the time of the matrix products of any exhaustive search: codes x vectors for each level,
in blocks that fit into the cache. All contestants take turns, and the minimum time of each counts. On a busy machine,
run more rounds and use `--threads 1 --clock cpu`, which excludes the time spent waiting for a core. Codes are compared
with a float64 search on some of the vectors. `vector-quantize-pytorch` is skipped if it is not installed (pip install
vector-quantize-pytorch). The exit code is 1 if a code differs.
"""

import argparse
import os
import sys
from collections.abc import Callable

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # silence the profiler, which measures memory

import torch
from measuring import CLOCKS, peak_mebibytes, seconds
from report import Table, add_json_option, machine, write_report

from evotok_plugin import ResidualVectorQuantizer
from evotok_plugin.common.command_parser import CommandParser

# Names in the table of the contestants that it shows.
_SHOWN = {
    "matrix products": "bare matrix products (floor)",
    "ours, evaluation": "evaluation",
    "ours, training": "training step",
    "ResidualVQ, evaluation": "vector-quantize-pytorch, evaluation",
}
_CHECKED = 32  # vectors whose codes are compared with a float64 search


def make_floor(z: torch.Tensor, codebooks: torch.Tensor) -> Callable[[], None]:
    """Only the matrix products: the scores of all codes and vectors for every level, block by block."""
    vectors = z.flatten(0, 1).T.contiguous()
    if z.is_cuda:
        num_vectors, num_codes = 4096, 4096
    else:
        num_vectors = min(512 * torch.get_num_threads(), vectors.shape[1])
        num_codes = 512 * torch.get_num_threads() * 512 // num_vectors
    blocks = [block.contiguous() for block in vectors.split(num_vectors, dim=1)]
    buffer = vectors.new_empty(num_codes * num_vectors)

    def run() -> None:
        for codebook in codebooks:
            for codes in codebook.split(num_codes):
                for block in blocks:
                    out = buffer[: codes.shape[0] * block.shape[1]].view(codes.shape[0], block.shape[1])
                    torch.mm(codes, block, out=out)

    return run


def make_peer(z: torch.Tensor, options: argparse.Namespace) -> torch.nn.Module | None:
    """ResidualVQ of vector-quantize-pytorch with the same settings; None if it is not installed or not requested."""
    if not options.peer_rounds:
        return None
    try:
        from vector_quantize_pytorch import ResidualVQ
    except ImportError:
        return None
    peer = ResidualVQ(
        dim=options.dim,
        codebook_size=options.codebook_size,
        num_quantizers=options.levels,
        decay=0.99,
        threshold_ema_dead_code=1,
    )
    return peer.to(z.device)


def codes_that_differ(z: torch.Tensor, codebooks: torch.Tensor, codes: torch.Tensor) -> int:
    """Count the codes of the first vectors that differ from a float64 search on the residual of the codes before."""
    residual, codes, wrong = z.flatten(0, 1)[:_CHECKED].double(), codes.flatten(0, 1)[:_CHECKED], 0
    for level, codebook in enumerate(codebooks):
        distances = torch.cdist(residual, codebook.double(), compute_mode="donot_use_mm_for_euclid_dist")
        taken = distances.gather(1, codes[:, level, None])[:, 0]
        wrong += int((taken > distances.amin(dim=1) * (1 + 1e-12)).sum())
        residual = residual - codebook[codes[:, level]].double()
    return wrong


def compare(num_images: int, options: argparse.Namespace) -> dict:
    """Run all contestants on one batch; returns their times and memory, and the number of wrong codes."""
    device = torch.device(options.device)
    clock = CLOCKS[options.clock]
    torch.manual_seed(0)
    z = torch.randn(num_images, options.positions, options.dim, device=device)
    sizes = {
        "num_quantizers": options.levels,
        "codebook_size": options.codebook_size,
        "codebook_dim": options.dim,
    }
    ours = ResidualVectorQuantizer(**sizes).to(device).eval()
    learner = ResidualVectorQuantizer(**sizes).to(device).train()
    peer = make_peer(z, options)
    runs: dict[str, tuple[Callable[[], object], int]] = {
        "matrix products": (make_floor(z, ours.codebooks), options.rounds),
        "ours, evaluation": (lambda: ours(z), options.rounds),
        "ours, training": (lambda: learner(torch.randn_like(z)), options.rounds),
    }
    if peer is not None:
        runs["ResidualVQ, evaluation"] = (lambda: peer.eval()(z), options.peer_rounds)
    result = {name: {"milliseconds": float("inf")} for name in runs}
    with torch.no_grad():
        for name, (run, _) in runs.items():
            result[name]["peak_mebibytes"] = round(peak_mebibytes(run, device), 1)
        for turn in range(max(rounds for _, rounds in runs.values())):
            for name, (run, rounds) in runs.items():
                if turn < rounds:
                    spent = 1000 * seconds(run, device, clock)
                    result[name]["milliseconds"] = round(min(result[name]["milliseconds"], spent), 3)
        wrong = codes_that_differ(z, ours.codebooks, ours(z).codes)
    floor = result["matrix products"]["milliseconds"]
    for row in result.values():
        row["times_floor"] = round(row["milliseconds"] / floor, 2)
    return {"images": num_images, "codes_unlike_float64": wrong, "contestants": result}


def main() -> int:
    """Run the comparison and print the results."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--images", type=int, nargs="+", default=[1, 8], help="batch sizes to compare at")
    parser.add_argument("--positions", type=int, default=256, help="positions per image")
    parser.add_argument("--levels", type=int, default=16, help="number of levels")
    parser.add_argument("--codebook_size", type=int, default=32768, help="codes per level")
    parser.add_argument("--dim", type=int, default=32, help="width of the vectors")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contestant; the minimum time counts")
    parser.add_argument("--peer_rounds", type=int, default=1, help="turns of vector-quantize-pytorch; 0 skips it")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's default")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: CPU time of all threads")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    add_json_option(parser)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    packages = ("torch", "triton", "vector-quantize-pytorch")
    on, results = machine(options.device, packages, clock=options.clock), []
    print(", ".join(f"{key} {value}" for key, value in on.items()))
    print(f"{options.levels} levels x {options.codebook_size} codes x {options.dim} dims")
    for num_images in options.images:
        result = compare(num_images, options)
        results.append(result)
        print(f"\n{num_images} images of {options.positions} positions")
        print(f"{'':26}{'ms':>12}{'x floor':>10}{'peak MiB':>10}")
        for name, row in result["contestants"].items():
            print(f"{name:26}{row['milliseconds']:12.1f}{row['times_floor']:10.2f}{row['peak_mebibytes']:10.1f}")
        print(f"{result['codes_unlike_float64']} of {_CHECKED * options.levels} codes differ from a float64 search")
    write_report(options.json, __file__, {"quantizer": table(results)}, on, {"results": results})
    return int(any(result["codes_unlike_float64"] for result in results))


def table(results: list[dict]) -> Table:
    """Times of all contestants per number of images, and the additional memory at the largest number."""
    largest, rows = results[-1], []
    for name, shown in _SHOWN.items():
        if name not in largest["contestants"]:
            continue
        timed = [result["contestants"][name] for result in results]
        cells = [f"{one['milliseconds']:.1f} ms ({one['times_floor']:.2f} x)" for one in timed]
        rows.append([shown, *cells, f"{timed[-1]['peak_mebibytes']:.1f} MiB"])
    counts = [f"{result['images']} image{'s' * (result['images'] != 1)}" for result in results]
    return Table(["", *counts, f"extra memory, {counts[-1]}"], rows)


if __name__ == "__main__":
    sys.exit(main())
