"""Compare the codes of drawing step by step with those of recorded steps (CUDA graphs), for several settings.

    python scripts/gpu/graphs.py --device cuda --json graphs.json

A small random model in float32 draws two images from the same seeds. Without a GPU the same steps run unrecorded.
"""

import argparse
import json
import sys
import time
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmark"))
from drawing_model import Prompts, make_model
from measuring import device_name, synchronize

from evotok_plugin import SamplingOptions
from evotok_plugin.common.command_parser import CommandParser
from llava_ext.generation import DrawingOptions

FILTERED = SamplingOptions(top_k=900, top_p=0.96)
SETTINGS = {
    "greedy": DrawingOptions(3.0, sampling=SamplingOptions(temperature=0)),
    "guided": DrawingOptions(3.0, "linear", sampling=FILTERED),
    "without guidance": DrawingOptions(1.0, sampling=FILTERED),
    "guided per level, in an interval, rescaled": DrawingOptions(
        [3.0, 2.0, 1.0, 1.0], guidance_interval=(0.2, 0.7), guidance_rescale=0.5, sampling=FILTERED
    ),
}


def first_difference(one: Tensor, other: Tensor) -> int | None:
    """The first position with different codes (R, N, L), or None."""
    different = (one != other).any(dim=2).any(dim=0).nonzero()
    return int(different[0]) if len(different) else None


def draw(model, options: DrawingOptions, num_positions: int, use_graphs: bool) -> tuple[Tensor, float]:
    """Codes (R, num_positions, L) and seconds."""
    started = time.perf_counter()
    *_, codes = islice(model.draw_codes(["x", "xy"], Prompts(), [1, 2], options, use_graphs), num_positions)
    synchronize(model.device)
    return codes, round(time.perf_counter() - started, 3)


def main() -> None:
    """Compare all settings."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where the model runs")
    parser.add_argument("--positions", type=int, default=64, help="number of drawn positions")
    parser.add_argument("--json", type=Path, required=True, help="file for the results")
    options = parser.parse_args()
    sizes = argparse.Namespace(backbone="small", head="tiny", dtype="float32", device=options.device)
    model = make_model(sizes)
    report = {"device": device_name(model.device), "positions": options.positions, "cases": []}
    with torch.no_grad():
        for name, setting in SETTINGS.items():
            setting = setting.completed()
            plain, seconds = draw(model, setting, options.positions, use_graphs=False)
            recorded, with_graphs = draw(model, setting, options.positions, use_graphs=True)
            again, _ = draw(model, setting, options.positions, use_graphs=True)
            difference = first_difference(plain, recorded)
            if difference is None:
                difference = first_difference(plain, again)
            case = {"options": name, "first_difference": difference, "seconds": seconds, "with_graphs": with_graphs}
            print(case, flush=True)
            report["cases"].append(case)
            options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
