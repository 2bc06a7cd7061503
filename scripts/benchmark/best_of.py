"""Measure the selection among drawn candidates: accuracy by skill when the best of N = 1, 2, 4, 8 images is kept.

    python scripts/benchmark/best_of.py                          # the included model
    python scripts/benchmark/best_of.py --model outputs/finetune --prompts_per_skill 200 --seed 1

Prompts and judge are those of `geneval_scenes`, with other prompts than the task's. Eight candidates are drawn per
prompt; the first N of them are those that `generate_images(best_of=N)` draws. Three selections are compared: by the
model's reading of the codes, by its reading of the images encoded again with all levels (`ReadingJudge`), and by the
judge itself (an oracle: it finds a correct image wherever there is one, pass@N). The table is printed as Markdown.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from report import Table, add_json_option, machine, write_report
from scipy.stats import rankdata

from eval_tasks.judging.rules import evaluate
from eval_tasks.judging.scene_detector import SceneDetector
from evotok_plugin.common import command_line
from evotok_plugin.common.command_parser import CommandParser
from evotok_plugin.common.progress import progress_bar
from evotok_plugin.common.recipes import check_seed
from evotok_plugin.errors import UserError
from evotok_plugin.scenes.captions import scene_prompts
from evotok_plugin.scenes.scene import SKILLS
from llava_ext.generation import PromptReader, ReadingJudge, SelectionOptions
from llava_ext.generation.selection import candidates_for
from llava_ext.model_folder import OpenModel, default_model_folder, open_model

NUMBERS = (1, 2, 4, 8)
SELECTIONS = ("reading", "reading, encoded again", "judge (oracle)")
_STREAM = 7_002  # of random numbers for prompts; `geneval_scenes` uses 7_001
_BATCH_SIZE = 64
_DIGITS = 3
T = TypeVar("T")


@dataclass
class Clock:
    """Wall and CPU seconds of the calls that it runs."""

    wall: float = 0.0
    cpu: float = 0.0

    def time(self, run: Callable[[], T]) -> T:
        """Run a call and add its time."""
        wall, cpu = time.perf_counter(), time.process_time()
        result = run()
        self.wall += time.perf_counter() - wall
        self.cpu += time.process_time() - cpu
        return result


@dataclass(frozen=True)
class Candidates:
    """P prompts with 8 candidates each.

    Attributes:
        skills: skill of each prompt.
        correct: the judge's verdicts (P, 8).
        scores: scores (P, 8) by selection, rounded so that equal drawings have equal scores.
        drawing, reading: time of all candidates.
    """

    skills: np.ndarray
    correct: np.ndarray
    scores: dict[str, np.ndarray]
    drawing: Clock
    reading: Clock

    def kept(self, selection: str, best_of: int) -> np.ndarray:
        """Whether the candidate that is kept among the first `best_of` ones is correct, (P,)."""
        best = self.scores[selection][:, :best_of].argmax(axis=1)  # of equal scores the first
        return np.take_along_axis(self.correct, best[:, None], axis=1)[:, 0]

    def accuracies(self, kept: np.ndarray) -> list[float]:
        """The mean over skills, and the accuracy of each skill, for verdicts (P,)."""
        by_skill = [float(kept[self.skills == skill].mean()) for skill in SKILLS]
        return [float(np.mean(by_skill)), *by_skill]


def draw_and_score(opened: OpenModel, instruction: str, prompts_per_skill: int, seed: int) -> Candidates:
    """Draw the candidates of all prompts, read them and judge them."""
    model, processor, most = opened.model, opened.processor, max(NUMBERS)
    rng = np.random.default_rng([seed, _STREAM])
    by_skill = [scene_prompts(skill, prompts_per_skill, rng) for skill in SKILLS]
    # A skill with fewer prompts repeats them, with other seeds.
    records = [different[n % len(different)] for different in by_skill for n in range(prompts_per_skill)]
    prompts, seeds = [record["prompt"] for record in records], [seed + index for index in range(len(records))]
    candidates = candidates_for(prompts, seeds, most)
    detector, drawing, reading = SceneDetector(), Clock(), Clock()
    reader, judge = PromptReader(model, processor, instruction), ReadingJudge(model, processor, instruction)
    correct: list[bool] = []
    scores: dict[str, list[float]] = {name: [] for name in SELECTIONS}
    with progress_bar(total=len(candidates), desc="candidates", unit="image") as bar:
        for start in range(0, len(candidates), _BATCH_SIZE):
            part = candidates[start : start + _BATCH_SIZE]
            texts, own_seeds = [one.prompt for one in part], [one.seed for one in part]
            codes = drawing.time(lambda: [*model.draw_codes(texts, processor, own_seeds)][-1])  # noqa: B023
            images = drawing.time(lambda: decode(opened, codes))  # noqa: B023
            scores["reading"] += reading.time(lambda: reader.scores(texts, codes).total.tolist())  # noqa: B023
            scores["reading, encoded again"] += judge(texts, images)
            for one, image in zip(part, images, strict=True):
                correct.append(evaluate(records[one.image], detector.detect(image), detector.rules).correct)
            bar.update(len(part))
    scores["judge (oracle)"] = [float(verdict) for verdict in correct]
    return Candidates(
        np.array([record["tag"] for record in records]),
        np.array(correct).reshape(-1, most),
        {name: np.array(values).round(_DIGITS).reshape(-1, most) for name, values in scores.items()},
        drawing,
        reading,
    )


@torch.no_grad()
def decode(opened: OpenModel, codes: torch.Tensor) -> list[Image.Image]:
    """Decode codes (R, N, L) to R images."""
    return opened.processor.image_processor.to_pil(opened.model.vision_tower.decode_pixels(codes))


def table(found: Candidates) -> Table:
    """Accuracy by selection, number of candidates and skill, with the cost of one image."""
    rows = []
    for selection in SELECTIONS:
        for best_of in NUMBERS if selection == SELECTIONS[0] else NUMBERS[1:]:
            accuracies = found.accuracies(found.kept(selection, best_of))
            cost = ["", ""]
            if selection == "reading":
                cost = [f"{best_of * one:.3f}" for one in cost_per_candidate(found, best_of)]
            name = "one candidate" if best_of == 1 else f"{selection}, N = {best_of}"
            rows.append([name, *(f"{value:.3f}" for value in accuracies), *cost])
    return Table(["selected by", "mean", *SKILLS, "s per image", "CPU s"], rows)


def cost_per_candidate(found: Candidates, best_of: int) -> tuple[float, float]:
    """Wall and CPU seconds of one candidate; a single one is not read."""
    read, count = best_of > 1, found.correct.size
    wall = found.drawing.wall + read * found.reading.wall
    return wall / count, (found.drawing.cpu + read * found.reading.cpu) / count


def agreement(found: Candidates) -> str:
    """Compare the ranks that the two readings give to the candidates, in a sentence."""
    codes, images = (found.scores[name] for name in SELECTIONS[:2])
    same = np.mean(codes.argmax(axis=1) == images.argmax(axis=1))
    ranks = [rankdata(scores, axis=1) for scores in (codes, images)]
    varied = [(a, b) for a, b in zip(*ranks, strict=True) if len({*a}) > 1 and len({*b}) > 1]
    correlation = np.mean([np.corrcoef(a, b)[0, 1] for a, b in varied])
    return (
        f"The two readings keep the same of {codes.shape[1]} candidates for {same:.0%} of the prompts; the mean rank "
        f"correlation of their scores is {correlation:.2f}."
    )


def main(argv: list[str] | None = None) -> int:
    """Run the measurement on the command line; returns the exit code."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--model", help="model folder (default: the newest in outputs/, or the included model)")
    parser.add_argument(
        "--prompts_per_skill", type=int, default=80, help="prompts per skill, repeated where a skill has fewer"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the prompts and images")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--instruction", help="the user's text under an image (default: the model's setting)")
    add_json_option(parser)
    return command_line.run(parser, argv, run)


def run(arguments: argparse.Namespace) -> None:
    """Measure and print the tables.

    Raises:
        UserError: a number is too small, or the model cannot be opened.
    """
    for name in ("prompts_per_skill", "threads"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    check_seed(arguments.seed)
    given = SelectionOptions(instruction=arguments.instruction)
    torch.set_num_threads(arguments.threads)
    opened = open_model(arguments.model or default_model_folder(), "cpu")
    instruction = given.for_model(opened.model).instruction
    found = draw_and_score(opened, instruction, arguments.prompts_per_skill, arguments.seed)
    print(f"{opened.name} ({opened.fingerprint[:12]}), instruction: {instruction}")
    on = machine(packages=("torch", "transformers"), seed=str(arguments.seed), model=opened.fingerprint[:12])
    print(
        f"{arguments.prompts_per_skill} prompts per skill; {', '.join(f'{key} {value}' for key, value in on.items())}\n"
    )
    print(table(found).markdown(), "", agreement(found), sep="\n")
    write_report(arguments.json, __file__, {"best-of": table(found)}, on, {"agreement": agreement(found)})


if __name__ == "__main__":
    sys.exit(main())
