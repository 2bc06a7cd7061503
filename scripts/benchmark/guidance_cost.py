"""Compare the time of drawing with guidance on half of the positions with that of guidance on all of them.

    python scripts/benchmark/guidance_cost.py --threads 1 --json guidance_cost.json
    python scripts/benchmark/guidance_cost.py --models tiny --batch 1 --rounds 1

Whole images are drawn: 16 positions behind the paper's image head and an LLM of Qwen2.5-0.5B's shape with random
weights, and the images of the included model. Weights are packed beforehand; rounds alternate between the settings, and
the minimum time counts. With one thread times are CPU times, else wall-clock times.

Every setting must draw the same codes as when the unconditional rows take part in all steps (greedy sampling).
"""

import argparse
import sys
from unittest import mock

import torch
import transformers
from drawing_model import Prompts, make_model
from measuring import clock_for, clock_name, seconds
from report import Table, add_json_option, machine, write_report
from torch import Tensor

from evotok_plugin import SamplingOptions
from evotok_plugin.common.command_parser import CommandParser
from llava_ext.generation import DrawingOptions
from llava_ext.generation.head_steps import ImageHeadStepper
from llava_ext.generation.thin_view import thin_view
from llava_ext.model_folder import INCLUDED_MODEL, open_model

POSITIONS_ON_A_SIDE = 4
SETTINGS = {
    "none": DrawingOptions(1.0),
    "first half": DrawingOptions(3.0, guidance_interval=(0, 0.5)),
    "last half": DrawingOptions(3.0, guidance_interval=(0.5, 1)),
    "all": DrawingOptions(3.0, guidance_interval=(0, 1)),
}
MODELS = ("tiny", "included", "paper")


def open_named(name: str):
    """A model and its processor."""
    if name == "included":
        opened = open_model(str(INCLUDED_MODEL), "cpu")
        return opened.model, opened.processor
    backbone = {"paper": "0.5b", "tiny": "tiny"}[name]
    sizes = argparse.Namespace(backbone=backbone, head=name, dtype="float32", device="cpu")
    return make_model(sizes, image_size=POSITIONS_ON_A_SIDE * 16), Prompts()


def measure(model, processor, count: int, options: argparse.Namespace) -> dict:
    """Measure all settings on a batch of `count` images."""
    clock, view = clock_for(torch.get_num_threads(), model.device), thin_view(model)
    prompts, seeds = ["a red ring" + " and a ring" * (n % 2) for n in range(count)], list(range(count))

    def draw(setting: DrawingOptions) -> Tensor:
        *_, codes = view.draw_codes(prompts, processor, seeds, setting)
        return codes

    same = True
    for setting in SETTINGS.values():  # also packs the weights
        greedy = DrawingOptions(sampling=SamplingOptions(temperature=0)).above(setting)
        codes = draw(greedy)
        if setting.guidance_scale != 1:
            everywhere = lambda stepper, _: range(stepper.steps_per_image)  # noqa: E731
            with mock.patch.object(ImageHeadStepper, "guided_steps", everywhere):
                same = same and torch.equal(codes, draw(greedy))
    spent: dict[str, list[float]] = {name: [] for name in SETTINGS}
    for _ in range(options.rounds):
        for name, setting in SETTINGS.items():
            spent[name].append(seconds(lambda: draw(setting), model.device, clock))  # noqa: B023
    least = {name: min(values) for name, values in spent.items()}
    return {
        "batch": count,
        "positions": model.config.vision_config.num_positions,
        "same_codes": same,
        "milliseconds": {name: round(1000 * value, 1) for name, value in least.items()},
        "share_of_all": {name: round(value / least["all"], 3) for name, value in least.items()},
    }


def table(results: list[dict]) -> Table:
    """A row for each model and batch size: the time with guidance everywhere, and the shares of the other settings."""
    rows = []
    for result in results:
        shares = [f"{result['share_of_all'][name]:.2f}" for name in ("first half", "last half", "none")]
        rows.append([f"{result['model']}, {result['batch']}", f"{result['milliseconds']['all']:.0f} ms", *shares])
    return Table(["model, batch", "all positions", "first half", "last half", "no guidance"], rows)


def main() -> int:
    """Run the comparison and print a row per model and batch; returns 1 if codes differ."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["included", "paper"], choices=MODELS, help="models to measure")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16], help="numbers of images drawn at once")
    parser.add_argument("--rounds", type=int, default=2, help="rounds; the minimum time counts")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's default")
    add_json_option(parser)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    clock = clock_name(torch.get_num_threads(), torch.device("cpu"))
    on, results = machine(packages=("torch", "transformers"), clock=clock), []
    print(", ".join(f"{key} {value}" for key, value in on.items()))
    for name in options.models:
        model, processor = open_named(name)
        for count in options.batch:
            with torch.no_grad():
                result = {"model": name, **measure(model.eval(), processor, count, options)}
            print(", ".join(f"{key} {value}" for key, value in result.items()), flush=True)
            results.append(result)
    shown = table(results)
    print(f"\n{shown.markdown()}")
    write_report(options.json, __file__, {"guidance-cost": shown}, on, {"results": results})
    return 0 if all(result["same_codes"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
