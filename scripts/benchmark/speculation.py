"""Compare several positions per step of the language model (`speculate`) with one.

    python scripts/benchmark/speculation.py --threads 1 --json speculation.json
    python scripts/benchmark/speculation.py --prompts_per_skill 0 --backbones small --head tiny

The first table is of the included model, one image at a time: steps of the language model per image, without that of
the prompt, and time relative to drawing with one position per step, prompts included, in rounds that alternate. Codes
must be those of one position per step.

The second one (`--backbones`) is of an LLM of Qwen2.5's shape with random weights and an image head, whose drafts would
all be wrong: the time of a step with several positions relative to one, and how often drafts must be right so that
drawing takes 0.7 of the time. With one thread times are CPU times, else wall-clock times.
"""

import argparse
import sys
from dataclasses import dataclass

import numpy as np
import torch
from drawing_model import BACKBONES, HEADS, PROMPT_TOKENS, make_model
from measuring import clock_for, seconds
from report import Table, add_json_option, machine, write_report
from torch import Tensor

from evotok_plugin.common import command_line
from evotok_plugin.common.command_parser import CommandParser
from evotok_plugin.errors import UserError
from evotok_plugin.scenes.captions import scene_prompts
from evotok_plugin.scenes.scene import SKILLS
from llava_ext.generation import DrawingOptions
from llava_ext.generation.head_steps import stepper_for
from llava_ext.generation.steps import Steps
from llava_ext.generation.thin_view import thin_view
from llava_ext.model_folder import INCLUDED_MODEL, open_model

CPU = torch.device("cpu")
SETTINGS = {
    "the model's own": DrawingOptions(),
    "guidance 3": DrawingOptions(3.0),
    "greedy": DrawingOptions(temperature=0),
}
WANTED = 0.7  # of the time of one position per step
_WARM_UP = 20  # steps, during which weights are packed
_IMAGE_SIZE = 64  # pixels, of the random model


# The included model -------------------------------------------------------------------------------------------------


@dataclass
class Comparison:
    """A window on one setting."""

    setting: str
    window: int
    num_steps: float  # per image, without that of the prompt
    milliseconds: float  # per image
    time: float  # relative to one position per step
    num_equal: int  # images with the same codes


def compare(options: argparse.Namespace) -> tuple[list[Comparison], int]:
    """Draw the same images in all settings and windows; also returns their number."""
    opened = open_model(str(INCLUDED_MODEL), "cpu")
    model, processor, rng = thin_view(opened.model.eval()), opened.processor, np.random.default_rng(0)
    prompts = [record["prompt"] for skill in SKILLS for record in scene_prompts(skill, options.prompts_per_skill, rng)]
    clock, calls = clock_for(torch.get_num_threads(), CPU), list[None]()
    model.language_model.register_forward_hook(lambda *_: calls.append(None))

    def draw(setting: DrawingOptions, window: int) -> list[Tensor]:
        drawn = []
        for seed, prompt in enumerate(prompts):
            *_, codes = model.draw_codes([prompt], processor, [seed], setting, speculate=window)
            drawn.append(codes)
        return drawn

    found, windows = [], [1, *options.windows]
    for name, setting in SETTINGS.items():
        equal, steps = {}, {}
        expected = draw(setting, 1)  # also packs the weights
        for window in windows:
            calls.clear()
            codes = draw(setting, window)
            steps[window] = len(calls) / len(prompts) - 1
            equal[window] = sum(map(torch.equal, codes, expected))
        least = dict.fromkeys(windows, float("inf"))
        for _ in range(options.rounds):
            for window in windows:
                spent = seconds(lambda: draw(setting, window), CPU, clock)  # noqa: B023
                least[window] = min(least[window], spent)
        for window in windows:
            per_image, time = 1000 * least[window] / len(prompts), least[window] / least[1]
            found.append(Comparison(name, window, steps[window], per_image, time, equal[window]))
    return found, len(prompts)


def comparison_table(found: list[Comparison], count: int) -> Table:
    header = ["settings", "positions per step", "steps per image", "ms per image", "time", "equal images"]
    rows = [
        [
            one.setting,
            str(one.window),
            f"{one.num_steps:.2f}",
            f"{one.milliseconds:.1f}",
            f"{one.time:.2f}",
            f"{one.num_equal} of {count}",
        ]
        for one in found
    ]
    return Table(header, rows)


# The time of a step -------------------------------------------------------------------------------------------------


def needed_share(positions: float, window: int) -> float | None:
    """Share of right drafts with which a step advances by a number of positions on average; None if none does.

    A step advances by 1 + a + ... + a^(W - 1) positions if drafts are right independently with probability a.
    """
    if positions > window:
        return None
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if sum(middle**n for n in range(window)) >= positions else (middle, high)
    return high


@torch.no_grad()
def step_seconds(backbone: str, options: argparse.Namespace) -> dict[int, float]:
    """Seconds of a step of the language model and the image head, without guidance, by the number of positions."""
    sizes = argparse.Namespace(backbone=backbone, head=options.head, dtype="float32", device="cpu")
    model, clock = thin_view(make_model(sizes, image_size=_IMAGE_SIZE)), clock_for(torch.get_num_threads(), CPU)
    stepper, width, windows = stepper_for(model), model.config.text_config.hidden_size, [1, *options.windows]
    chosen, longest = DrawingOptions(1.0).for_model(model), max(windows)
    inputs = torch.randn(1, PROMPT_TOKENS + longest, width, generator=torch.Generator().manual_seed(0))
    mask, noise = torch.ones(1, PROMPT_TOKENS), torch.full((longest, stepper.codes_per_step), 0.5)
    steps = Steps(model.language_model, inputs[:, :PROMPT_TOKENS], mask, PROMPT_TOKENS + longest)
    before = steps.hidden

    def step(window: int) -> None:
        states = steps.run(inputs[:, PROMPT_TOKENS : PROMPT_TOKENS + window])
        stepper.draw(states.flatten(0, 1), 0, noise[:window], chosen, [1.0] * stepper.codes_per_step)
        steps.drop_last(window, before)

    for window in (1, longest):
        for _ in range(_WARM_UP):
            step(window)
    least = dict.fromkeys(windows, float("inf"))
    for _ in range(5 * options.rounds):
        for window in windows:
            least[window] = min(least[window], seconds(lambda: step(window), CPU, clock))  # noqa: B023
    return least


def cost_table(costs: dict[str, dict[int, float]]) -> Table:
    header = ["LLM", "positions per step", "ms per step", "times one", f"positions for {WANTED}", "right drafts"]
    rows = []
    for backbone, spent in costs.items():
        for window, value in spent.items():
            times = value / spent[1]
            share = needed_share(times / WANTED, window)
            needed = ["", ""] if window == 1 else [f"{times / WANTED:.2f}", "-" if share is None else f"{share:.0%}"]
            rows.append([backbone, str(window), f"{1000 * value:.1f}", f"{times:.2f}", *needed])
    return Table(header, rows)


def run(options: argparse.Namespace) -> int:
    """Measure, print the tables and return 1 if codes differ.

    Raises:
        UserError: a number is too small.
    """
    for name, least in (("prompts_per_skill", 0), ("rounds", 1)):
        if getattr(options, name) < least:
            raise UserError(f"--{name} must be at least {least}, got {getattr(options, name)}")
    if min(options.windows) < 2:
        raise UserError(f"--windows: expected numbers from 2 on, got {min(options.windows)}; 1 is always measured")
    if options.threads:
        torch.set_num_threads(options.threads)
    if not options.prompts_per_skill and not options.backbones:
        raise UserError("--prompts_per_skill 0 and --backbones without a name leave nothing to measure")
    found: list[Comparison] = []
    tables, count = dict[str, Table](), 0
    if options.prompts_per_skill:
        found, count = compare(options)
        tables["speculation"] = comparison_table(found, count)
    if options.backbones:
        costs = {name: step_seconds(name, options) for name in options.backbones}
        tables["speculation-cost"] = cost_table(costs)
    print("\n\n".join(table.markdown() for table in tables.values()))
    clock = "cpu" if torch.get_num_threads() == 1 else "wall"
    write_report(options.json, __file__, tables, machine(packages=("torch", "transformers"), clock=clock))
    return 0 if all(one.num_equal == count for one in found) else 1


def main() -> int:
    """Parse the flags and measure."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--windows", type=int, nargs="+", default=[2, 3, 4, 8], help="numbers of positions per step")
    parser.add_argument("--prompts_per_skill", type=int, default=5, help="images per skill; 0: no first table")
    parser.add_argument("--backbones", nargs="*", default=["0.5b"], choices=list(BACKBONES), help="random LLMs")
    parser.add_argument("--head", default="paper", choices=list(HEADS), help="image head of the random LLMs")
    parser.add_argument("--rounds", type=int, default=3, help="rounds; the minimum time counts")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's default")
    add_json_option(parser)
    return command_line.run(parser, work=run)


if __name__ == "__main__":
    sys.exit(main())
