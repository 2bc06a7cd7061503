"""Draw the pictures of the README with the included model, at its default settings and with the first seeds.

    python scripts/pictures/documentation.py

writes docs/drawn.png (four drawings for one prompt of each skill) and docs/first_screen.png (a prompt, the image
position by position, and a conversation about it). Nothing is selected: the prompts come from a fixed seed, and the
seeds of the images are 0 to 3.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from evotok_plugin.common import command_line
from evotok_plugin.common.command_parser import CommandParser
from evotok_plugin.common.pictures import enlarged, labeled_rows, save_picture
from evotok_plugin.scenes.captions import scene_prompts
from evotok_plugin.scenes.scene import SKILLS
from llava_ext.generation import AnswerOptions
from llava_ext.generation.previews import preview
from llava_ext.model_folder import OpenModel, default_model_folder, open_model
from llava_ext.serving.session import ChatSession

DOCS = Path(__file__).resolve().parents[2] / "docs"
PROMPT = "a photo of a red circle above a blue square"
QUESTIONS = ("How many objects are there?", "What color is the square?", "Where is the circle relative to the square?")
STEPS = (1, 3, 5, 7, 9)  # positions of the image that are drawn in the pictures of the strip
_SIDE, _GAP, _LINE = 144, 16, 30
_TEXT, _ANSWER, _FAINT = "#1f2937", "#1d4ed8", "#6b7280"


def skills_picture(opened: OpenModel) -> Image.Image:
    """Four drawings for one prompt of each skill."""
    rng = np.random.default_rng(7)
    prompts = [scene_prompts(skill, 1, rng)[0]["prompt"] for skill in SKILLS]
    images = opened.model.generate_images(prompts, processor=opened.processor, num_images=4, batch_size=24, seed=0)
    return labeled_rows({prompt: images[4 * n : 4 * n + 4] for n, prompt in enumerate(prompts)}, scale=3)


def stages_of_drawing(opened: OpenModel, prompt: str) -> list[Image.Image]:
    """The image of a prompt, seed 0, after some of its positions."""
    steps = list(opened.model.draw_codes([prompt], opened.processor, [0]))
    return [preview(opened.model.vision_tower, opened.processor, steps[step - 1])[0] for step in STEPS]


def answers(opened: OpenModel, prompt: str, questions: Sequence[str]) -> list[str]:
    """Answers about the drawing of a prompt, each in a conversation of its own."""
    found = []
    for question in questions:
        session = ChatSession()
        for text, options in ((prompt, AnswerOptions(image_first=True)), (question, AnswerOptions())):
            for _ in session.ask(opened.model, opened.processor, text, [], options, seed=0):
                pass
        found.append("".join(part.get("text", "") for part in session.messages[-1]["content"]))
    return found


def first_screen(opened: OpenModel) -> Image.Image:
    """A prompt, its image position by position, and questions about it with the model's answers."""
    strip = stages_of_drawing(opened, PROMPT)
    replies = answers(opened, PROMPT, QUESTIONS)
    scale = _SIDE // strip[0].width
    width = len(strip) * (_SIDE + _GAP) + _GAP
    top = _GAP + _LINE
    canvas = Image.new("RGB", (width, top + _SIDE + _LINE * (1 + len(QUESTIONS)) + _GAP), "white")
    pen = ImageDraw.Draw(canvas)
    text, small = ImageFont.load_default(18), ImageFont.load_default(13)
    pen.text((_GAP, _GAP), f"> {PROMPT}", fill=_TEXT, font=text)
    for n, (step, image) in enumerate(zip(STEPS, strip, strict=True)):
        left = _GAP + n * (_SIDE + _GAP)
        canvas.paste(enlarged(image, scale), (left, top))
        pen.text((left, top + _SIDE + 3), f"{step} of {STEPS[-1]} positions", fill=_FAINT, font=small)
    for n, (question, reply) in enumerate(zip(QUESTIONS, replies, strict=True)):
        line = top + _SIDE + _LINE * (n + 1)
        pen.text((_GAP, line), f"> {question}", fill=_TEXT, font=text)
        pen.text((width // 2 + 40, line), reply, fill=_ANSWER, font=text)
    return canvas


def main() -> int:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--model", help="model folder (default: the included model)")
    parser.add_argument("-o", "--output", type=Path, default=DOCS, help="folder of the pictures")
    return command_line.run(parser, work=run)


def run(options: argparse.Namespace) -> None:
    """Write both pictures."""
    opened = open_model(options.model or default_model_folder(), "cpu")
    save_picture(skills_picture(opened), options.output / "drawn.png")
    save_picture(first_screen(opened), options.output / "first_screen.png")


if __name__ == "__main__":
    sys.exit(main())
