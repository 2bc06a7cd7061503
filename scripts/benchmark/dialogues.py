"""Ask a model about the images that it has just drawn in the same conversation.

    python scripts/benchmark/dialogues.py --dialogues 200 --show 20

Every dialogue has two turns, with the settings and code of `evotok-llava chat`: a prompt of the scene corpus, which the
model should answer with an image, and an open-ended question about the shape, the color, the number or the place of
the drawn objects, in turn. The exact detector of scenes finds what was really drawn, which decides the true answer,
whatever the prompt said. If the drawn objects do not allow a question of the kind (the color of "the circle" among two
circles), the dialogue is repeated with another prompt, and counted. An answer is malformed if it is not one of the
corpus's answers.
"""

import argparse
import sys
from collections import Counter
from dataclasses import dataclass

import numpy as np
from drawn_scenes import add_model_options, detected_scene, open_from, show
from PIL import Image
from report import Table

from evotok_plugin.common import command_line
from evotok_plugin.common.command_parser import CommandParser
from evotok_plugin.common.progress import progress_bar
from evotok_plugin.scenes.captions import NUMBERS, prompt_record, rich_prompt
from evotok_plugin.scenes.questions import Question, sample_question
from evotok_plugin.scenes.scene import CELL_NAMES, COLORS, RELATIONS, SHAPES, SKILLS, Scene, sample_scene
from llava_ext.generation import AnswerOptions, DrawingOptions, ImageDrawn, TextDelta
from llava_ext.model_folder import OpenModel
from llava_ext.serving.session import ChatSession

# Kinds of questions, and the categories of the corpus that they have.
KINDS = {"shape": ("shape",), "color": ("color",), "number": ("counting",), "place": ("location", "relation")}
ANSWERS = frozenset({*SHAPES, *COLORS, *NUMBERS, *CELL_NAMES, *RELATIONS, "yes", "no"})
_STREAM = 7_301  # random numbers unlike those of corpora and tasks
_QUESTION_TRIES = 200  # a category has at least 8 % of the sampled questions
_DIALOGUE_TRIES = 20


@dataclass
class Outcome:
    """One finished dialogue."""

    kind: str
    prompt: str
    question: Question
    answer: str

    @property
    def is_malformed(self) -> bool:
        return self.answer not in ANSWERS

    @property
    def is_correct(self) -> bool:
        return self.answer == self.question.answer


def question_about(scene: Scene, kind: str, rng: np.random.Generator) -> Question | None:
    """A question of one kind that the scene answers; None if it has none, or more objects than the corpus counts."""
    if len(scene.objects) >= len(NUMBERS):
        return None
    for _ in range(_QUESTION_TRIES):
        question = sample_question(scene, rng)
        if question.category in KINDS[kind]:
            return question
    return None


def ask(
    opened: OpenModel, session: ChatSession, text: str, options: AnswerOptions, seed: int
) -> tuple[str, list[Image.Image]]:
    """Ask one question; returns the text of the answer, with "<image>" for each of its images, and the images."""
    words, images = "", []
    for event in session.ask(opened.model, opened.processor, text, [], options, seed):
        if isinstance(event, TextDelta):
            words += event.text
        elif isinstance(event, ImageDrawn):
            words += "<image>"
            images.append(event.image)
    return words.strip(), images


def hold_dialogue(
    opened: OpenModel, options: AnswerOptions, kind: str, number: int, seed: int, counts: Counter
) -> Outcome | None:
    """Hold one dialogue, with other prompts until a question of the kind is possible; adds to `counts`."""
    rng = np.random.default_rng([seed, _STREAM, number])
    for _ in range(_DIALOGUE_TRIES):
        skill = str(rng.choice(SKILLS))
        wanted = sample_scene(rng, skill)
        if question_about(wanted, kind, rng) is None:
            continue
        prompt = prompt_record(wanted, skill)["prompt"] if rng.random() < 0.5 else rich_prompt(wanted, skill, rng)
        session, image_seed = ChatSession(), int(rng.integers(2**31))
        _, images = ask(opened, session, prompt, options, image_seed)
        counts["requests"] += 1
        if not images:
            continue
        counts["drawn"] += 1
        scene = detected_scene(images[-1])
        question = scene and question_about(scene, kind, rng)
        if not question:
            continue
        counts["questions"] += 1
        answer, _ = ask(opened, session, question.text, options, image_seed + 1)
        return Outcome(kind, prompt, question, answer)
    return None


def main() -> int:
    """Hold the dialogues and print accuracy by kind as Markdown."""
    parser = CommandParser(description=__doc__)
    add_model_options(parser)
    parser.add_argument(
        "--dialogues", type=int, default=200, help="dialogues, split evenly over the kinds of questions"
    )
    parser.add_argument("--show", type=int, default=0, metavar="N", help="list up to N wrong answers")
    return command_line.run(parser, work=run)


def run(options: argparse.Namespace) -> None:
    """Hold the dialogues and print the table."""
    opened = open_from(options)
    answering = AnswerOptions(drawing=DrawingOptions().for_model(opened.model))
    kinds, counts, outcomes = list(KINDS), Counter(), []
    for number in progress_bar(range(options.dialogues), desc="dialogues"):
        outcome = hold_dialogue(opened, answering, kinds[number % len(kinds)], number, options.seed, counts)
        if outcome is not None:
            outcomes.append(outcome)
    rows = []
    for kind in [*kinds, "all"]:
        group = [outcome for outcome in outcomes if kind in (outcome.kind, "all")]
        correct, malformed = (sum(getattr(o, name) for o in group) for name in ("is_correct", "is_malformed"))
        total = max(1, len(group))
        rows.append([kind, str(len(group)), f"{correct / total:.3f}", f"{malformed / total:.3f}"])
    show(options, __file__, opened, {"dialogues": Table(["question", "dialogues", "correct", "malformed"], rows)})
    print(
        f"\n{counts['drawn']} of {counts['requests']} requests were answered with an image; "
        f"{counts['questions']} of the {counts['drawn']} images allowed a question of the kind"
    )
    wrong = [outcome for outcome in outcomes if not outcome.is_correct]
    for outcome in wrong[: options.show]:
        print(f"- {outcome.prompt} | {outcome.question.text} -> {outcome.answer!r}, not {outcome.question.answer!r}")


if __name__ == "__main__":
    sys.exit(main())
