"""Compare `ThinLinear` with PyTorch's linear layer for few rows, by the shape of the layer.

    python scripts/benchmark/linear_layers.py --threads 1 --json linear_layers.json
    python scripts/benchmark/linear_layers.py --shapes 576x1536 --rows 4 --dtype bfloat16

Each shape has as many layers as fit into 200 MB (at most 24), called in turn, so that weights come from memory as they
do in a model. Rounds alternate, and the minimum counts. Layers below the size limit of `can_be_thin` show why there is
one; for fewer rows than `min_rows` ours is PyTorch's layer. With one thread times are CPU times, else wall-clock times.
"""

import sys

import torch
from measuring import clock_for, clock_name, seconds
from report import Table, add_json_option, machine, write_report
from torch import nn

from evotok_plugin.common.command_parser import CommandParser
from evotok_plugin.kernels.thin_linear import LIMITS, PACK_AFTER, ThinLinear

# Inputs x outputs: of the included model, SmolLM2-135M, Qwen2.5-0.5B, and the paper's image head with its classifier.
SHAPES = (
    "128x320", "256x512", "256x1024", "576x576", "576x1536", "1536x576", "896x896", "896x4864", "4864x896", "2560x7680",
    "10240x2560", "2560x32768",
)  # fmt: skip
_BYTES = 200e6
_MOST_LAYERS = 24


def measure(shape: str, num_rows: list[int], dtype: torch.dtype, rounds: int) -> dict:
    """Microseconds per product of both, by the number of rows."""
    wide, narrow = map(int, shape.split("x"))
    num_layers = max(1, min(_MOST_LAYERS, int(_BYTES / (4 * wide * narrow))))
    layers = [nn.Linear(wide, narrow, bias=False, dtype=dtype) for _ in range(num_layers)]
    thin = [ThinLinear.of(layer) for layer in layers]
    clock, cpu = clock_for(torch.get_num_threads(), torch.device("cpu")), torch.device("cpu")
    for layer in thin:
        for _ in range(PACK_AFTER + 1):
            layer(torch.randn(4, wide, dtype=dtype))
    found, equal = [], True
    for rows in num_rows:
        x, best = torch.randn(rows, wide, dtype=dtype), {"PyTorch": float("inf"), "ours": float("inf")}
        tolerance = 1e-4 if dtype == torch.float32 else 5e-2
        equal = equal and torch.allclose(thin[0](x), layers[0](x), atol=tolerance, rtol=tolerance)
        for _ in range(rounds):
            for name, called in (("PyTorch", layers), ("ours", thin)):
                spent = seconds(lambda: [layer(x) for layer in called], cpu, clock)  # noqa: B023
                best[name] = min(best[name], 1e6 * spent / num_layers)
        rate = layers[0].weight.nbytes / best["ours"] / 1000
        best = {name: round(value, 2) for name, value in best.items()}
        found.append({"rows": rows, "microseconds": best, "gigabytes_per_second": round(rate, 1)})
    return {"shape": shape, "is_thin": wide * narrow >= LIMITS.min_elements, "equal": equal, "results": found}


def table(results: list[dict]) -> Table:
    """A row for each shape, numbers of rows as columns: microseconds of PyTorch's layer and of ours."""
    numbers = [one["rows"] for one in results[0]["results"]]
    rows = []
    for result in results:
        pairs = [one["microseconds"] for one in result["results"]]
        name = result["shape"] + ("" if result["is_thin"] else ", below the limit")
        rows.append([name, *(f"{pair['PyTorch']:.0f} / {pair['ours']:.0f} us" for pair in pairs)])
    return Table(["inputs x outputs", *(f"{number} rows" if number > 1 else "1 row" for number in numbers)], rows)


def main() -> int:
    """Run the comparison and print a row per shape; returns 1 if the products differ."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), help="inputs x outputs of the layers")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64], help="numbers of rows")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="dtype of the weights")
    parser.add_argument("--rounds", type=int, default=8, help="rounds; the minimum time counts")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's default")
    add_json_option(parser)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    clock = clock_name(torch.get_num_threads(), torch.device("cpu"))
    on, results = machine(clock=clock), []
    print(", ".join(f"{key} {value}" for key, value in on.items()))
    with torch.no_grad():
        for shape in options.shapes:
            results.append(measure(shape, options.rows, getattr(torch, options.dtype), options.rounds))
            pairs = [(one["rows"], *one["microseconds"].values()) for one in results[-1]["results"]]
            print(
                shape, ", ".join(f"{rows}: {torch_us:.0f} / {own:.0f} us" for rows, torch_us, own in pairs), flush=True
            )
    shown = table(results)
    print(f"\n{shown.markdown()}")
    write_report(options.json, __file__, {"linear-layers": shown}, on, {"dtype": options.dtype, "results": results})
    return 0 if all(result["equal"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
