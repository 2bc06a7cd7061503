"""Measure whether a model tells questions and requests outside the domain of the scenes from those inside.

    python scripts/benchmark/out_of_domain.py --count 400 --show 10

Outside: held-out texts of `evotok_plugin.scenes.other_topics` (words and templates that training never sees), without
an image and about an image of a scene; the answer should be the fixed sentence. Inside: open-ended questions about
images of scenes, and prompts of the corpus that ask for a drawing; these should never be answered with the sentence,
and a prompt should be answered with an image. Answers are greedy, and the model decides between text and image.
"""

import argparse
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from drawn_scenes import add_model_options, open_from, show
from report import Table

from evotok_plugin.common import command_line
from evotok_plugin.common.command_parser import CommandParser
from evotok_plugin.common.progress import progress_bar
from evotok_plugin.scenes.captions import prompt_record, rich_prompt
from evotok_plugin.scenes.other_topics import OUT_OF_DOMAIN_ANSWER, other_topic_question, other_topic_turns
from evotok_plugin.scenes.questions import sample_question
from evotok_plugin.scenes.scene import SKILLS, Scene, render, sample_scene
from llava_ext.model_folder import OpenModel

_STREAM = 7_303  # random numbers unlike those of corpora and tasks
KINDS = ("outside, text", "outside, image", "inside, question", "inside, drawing")


@dataclass(frozen=True)
class Case:
    """One message to the model: a text, after an image of the scene if there is one."""

    text: str
    scene: Scene | None = None

    def as_chat(self, image_size: int) -> list[dict[str, Any]]:
        """The conversation of this one message, as Hugging Face messages."""
        content: list[dict[str, Any]] = [{"type": "text", "text": self.text}]
        if self.scene is not None:
            content.insert(0, {"type": "image", "image": render(self.scene, image_size)})
        return [{"role": "user", "content": content}]


def sample_case(kind: str, rng: np.random.Generator) -> Case:
    """Sample a message of one of `KINDS`."""
    skill = str(rng.choice(SKILLS))
    scene = sample_scene(rng, skill)
    if kind == "outside, text":
        return Case(other_topic_question(rng, "val"))
    if kind == "outside, image":
        return Case(other_topic_turns(rng, "val")[0], scene)
    if kind == "inside, question":
        return Case(sample_question(scene, rng).text, scene)
    return Case(prompt_record(scene, skill)["prompt"] if rng.random() < 0.5 else rich_prompt(scene, skill, rng))


@torch.inference_mode()
def answers(opened: OpenModel, cases: list[Case]) -> list[str]:
    """The text of each answer; images appear as the tokens that delimit them."""
    model, processor = opened.model, opened.processor
    inputs = processor.apply_chat_template(
        [case.as_chat(model.config.vision_config.image_size) for case in cases],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        padding=True,
    ).to(model.device)
    ids = model.generate(**inputs, modalities="auto", processor=processor)
    start = inputs["input_ids"].shape[1]
    return [_text(processor, row[start:]) for row in ids]


def _text(processor: Any, ids: torch.Tensor) -> str:
    """Decode an answer, "<image>" if it holds an image."""
    if (ids == processor.image_start_id).any():
        return "<image>"
    return processor.decode(ids, skip_special_tokens=True).strip()


def main() -> int:
    """Answer all messages and print the shares as Markdown."""
    parser = CommandParser(description=__doc__)
    add_model_options(parser)
    parser.add_argument("--count", type=int, default=400, help="messages of each kind")
    parser.add_argument("--batch_size", type=int, default=32, help="messages answered at once")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="list up to N wrong answers of each kind")
    return command_line.run(parser, work=run)


def run(options: argparse.Namespace) -> None:
    """Answer the messages and print the table."""
    opened = open_from(options)
    rows, wrong = [], []
    for number, kind in enumerate(KINDS):
        rng = np.random.default_rng([options.seed, _STREAM, number])
        cases = [sample_case(kind, rng) for _ in range(options.count)]
        given: list[str] = []
        for start in progress_bar(range(0, len(cases), options.batch_size), desc=kind):
            given += answers(opened, cases[start : start + options.batch_size])
        refused = [answer == OUT_OF_DOMAIN_ANSWER for answer in given]
        drawn = [answer == "<image>" for answer in given]
        right = {"outside": refused, "inside": drawn if kind.endswith("drawing") else [not r for r in refused]}
        rows.append([kind, str(len(cases)), f"{np.mean(refused):.3f}", f"{np.mean(drawn):.3f}"])
        pairs = zip(cases, given, right[kind.split(",")[0]], strict=True)
        wrong += [(kind, case.text, answer) for case, answer, ok in pairs if not ok][: options.show]
    header = ["message", "count", "answered with the sentence", "answered with an image"]
    show(options, __file__, opened, {"out-of-domain": Table(header, rows)})
    for kind, text, answer in wrong:
        print(f"- {kind}: {text} -> {answer[:80]!r}")


if __name__ == "__main__":
    sys.exit(main())
