"""Contact sheets of a judged run: a self-contained HTML page of all images, and a PNG of some images per skill."""

import base64
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from markupsafe import Markup
from PIL import Image, ImageDraw, ImageFont, ImageOps

from eval_tasks.judging.answers import open_image
from eval_tasks.judging.drawn_run import DrawnRun
from eval_tasks.judging.scores import OVERALL, Judgement, Score
from evotok_plugin.common.files import write_whole
from evotok_plugin.common.templates import open_template

_THUMBNAIL = 112  # pixels
_PROMPTS_PER_SKILL, _HEAD_LINES = 4, 6  # in the PNG
_GOOD, _BAD = "#1a7f37", "#cf222e"


def write_report(folder: Path, run: DrawnRun, judgements: Sequence[Judgement], scores: dict[str, Score]) -> None:
    """Write `contact_sheet.html` and `contact_sheet.png`; one image at a time is in memory.

    Raises:
        UserError: an image cannot be read, or a file cannot be written.
    """
    skills = _by_skill_and_prompt(judgements)
    page = open_template("eval_tasks.judging", "contact_sheet.html.jinja").stream(
        title=f"{run.task}: {len(run.drawn)} images",
        about=run.about,
        num_wrong=sum(item.correct is False for item in judgements),
        side=_THUMBNAIL,
        good=_GOOD,
        bad=_BAD,
        scores=scores,
        skills=skills,
        thumbnail=lambda item: _as_base64_jpeg(_thumbnail(run.folder / item.image)),
        verdict=_verdict,
        passed=lambda items: Markup(' class="passed"') if all(item.correct for item in items) else "",
    )
    write_whole(folder / "contact_sheet.html", lambda part: page.dump(str(part), encoding="utf-8"), shared=True)
    picture = _picture(run, skills)
    write_whole(folder / "contact_sheet.png", lambda part: picture.save(part, "PNG"), shared=True)


def _by_skill_and_prompt(judgements: Iterable[Judgement]) -> dict[str, list[list[Judgement]]]:
    """Group the images by prompt, and the prompts by their first skill."""
    groups: dict[str, dict[int, list[Judgement]]] = {}
    for item in judgements:
        skill = next(iter(item.marks), OVERALL)
        groups.setdefault(skill, {}).setdefault(item.index, []).append(item)
    return {skill: list(prompts.values()) for skill, prompts in groups.items()}


def _thumbnail(path: Path, size: int = _THUMBNAIL) -> Image.Image:
    """Fit an image into a square; small images are enlarged without smoothing."""
    image = open_image(path)
    if max(image.size) <= size // 2:
        factor = size // max(image.size)
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image.thumbnail((size, size), Image.Resampling.BICUBIC)
    return image


def _as_base64_jpeg(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=88)
    return base64.b64encode(file.getvalue()).decode()


def _verdict(item: Judgement) -> str:
    """The caption of an image."""
    if item.correct is None:
        return f"{item.score:.3f}" + (f"; no: {item.reason}" if item.reason else "")
    return "correct" if item.correct else item.reason


def _picture(run: DrawnRun, prompts: dict[str, list[list[Judgement]]]) -> Image.Image:
    """The model and settings, then a row per skill: two images of each of its first prompts, framed by verdict."""
    cell, text, gap = _THUMBNAIL + 8, 34, 8
    rows = [[item for images in groups[:_PROMPTS_PER_SKILL] for item in images[:2]] for groups in prompts.values()]
    width = max(len(row) for row in rows) * (cell + gap) + gap
    font, bold = ImageFont.load_default(size=10), ImageFont.load_default(size=13)
    head = _lines(_as_line(run), font, width - 2 * gap, most=_HEAD_LINES)
    start = gap + 12 * len(head)
    canvas = Image.new("RGB", (width, start + len(rows) * (cell + text + 18 + gap) + gap), "white")
    pen = ImageDraw.Draw(canvas)
    for line, words in enumerate(head):
        pen.text((gap, gap + 12 * line), words, "#222222", font)
    for number, (skill, row) in enumerate(zip(prompts, rows, strict=True)):
        top = gap + start + number * (cell + text + 18 + gap)
        pen.text((gap, top), skill, "#222222", bold)
        for column, item in enumerate(row):
            left = gap + column * (cell + gap)
            frame = "#999999" if item.correct is None else _GOOD if item.correct else _BAD
            image = ImageOps.expand(_thumbnail(run.folder / item.image), 4, frame)
            canvas.paste(image, (left + (cell - image.width) // 2, top + 18 + (cell - image.height) // 2))
            for line, words in enumerate(_lines(item.prompt, font, cell)):
                pen.text((left, top + 20 + cell + 11 * line), words, "#222222", font)
    return canvas


def _as_line(run: DrawnRun) -> str:
    """The task, the number of images, the model and its settings in one line."""
    return ", ".join(
        [f"{run.task}: {len(run.drawn)} images", *(f"{name} {value}" for name, value in run.about.items())]
    )


def _lines(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, most: int = 3) -> list[str]:
    """Break a text into lines that fit."""
    lines = [""]
    for word in text.removeprefix("a photo of ").split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines[:most]
