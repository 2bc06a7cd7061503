"""A judged run to look at: a self-contained HTML page of all images with verdicts, and a PNG of some of each skill."""

import base64
import html
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from eval_tasks.judging.answers import open_image
from eval_tasks.judging.drawn_run import DrawnRun
from eval_tasks.judging.scores import OVERALL, Judgement, Score

_THUMBNAIL = 112  # pixels
_PROMPTS_A_SKILL = 4  # of the PNG
_GOOD, _BAD = "#1a7f37", "#cf222e"
_STYLE = f"""
body {{ font: 14px/1.4 system-ui, sans-serif; margin: 2em auto; max-width: 75em; color: #222; padding: 0 1em }}
table {{ border-collapse: collapse; margin: 1em 0 }} td, th {{ padding: .2em .8em; text-align: left }}
tr:nth-child(even) {{ background: #f4f4f4 }} h2 {{ margin: 1.5em 0 .3em }}
section {{ display: flex; flex-wrap: wrap; gap: 1.2em }} article {{ max-width: {2 * _THUMBNAIL + 40}px }}
article p {{ margin: .2em 0; font-weight: 600 }} .images {{ display: flex; flex-wrap: wrap; gap: 6px }}
figure {{ margin: 0; width: {_THUMBNAIL + 8}px }} figcaption {{ font-size: 11px; overflow-wrap: anywhere }}
img {{ width: {_THUMBNAIL}px; border: 4px solid #999; image-rendering: auto }}
.good img {{ border-color: {_GOOD} }} .bad img {{ border-color: {_BAD} }}
"""


def write_report(folder: Path, run: DrawnRun, judgements: Sequence[Judgement], scores: dict[str, Score]) -> None:
    """Write `contact_sheet.html` and `contact_sheet.png`; images are opened one after the other."""
    prompts = _by_skill_and_prompt(judgements)
    with (folder / "contact_sheet.html").open("w") as page:
        page.writelines(_page(run, prompts, scores))
    _picture(run, prompts).save(folder / "contact_sheet.png")


def _by_skill_and_prompt(judgements: Iterable[Judgement]) -> dict[str, list[list[Judgement]]]:
    """The images of each prompt together, prompts under their first skill."""
    groups: dict[str, dict[int, list[Judgement]]] = {}
    for item in judgements:
        skill = next(iter(item.marks), OVERALL)
        groups.setdefault(skill, {}).setdefault(item.index, []).append(item)
    return {skill: list(prompts.values()) for skill, prompts in groups.items()}


def _thumbnail(path: Path, size: int = _THUMBNAIL) -> Image.Image:
    """An image within a square; small ones are enlarged without smoothing."""
    image = open_image(path)
    if max(image.size) <= size // 2:
        factor = size // max(image.size)
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image.thumbnail((size, size), Image.Resampling.BICUBIC)
    return image


def _verdict(item: Judgement) -> str:
    """What stands under an image."""
    if item.correct is None:
        return f"{item.score:.3f}" + (f"; no: {item.reason}" if item.reason else "")
    return "correct" if item.correct else item.reason


def _page(run: DrawnRun, prompts: dict[str, list[list[Judgement]]], scores: dict[str, Score]) -> Iterator[str]:
    title = html.escape(f"{run.task}: {len(run.drawn)} images")
    yield f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
    yield f"<h1>{title}</h1><table><tr><th></th><th>score</th><th>95 % interval</th><th>prompts</th></tr>"
    for name, score in scores.items():
        interval = f"{score.low:.3f} to {score.high:.3f}"
        cells = (name, f"{score.value:.3f}", interval, str(score.num_prompts))
        yield f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>"
    yield "</table>"
    for skill, groups in prompts.items():
        yield f"<h2>{html.escape(skill)}</h2><section>"
        for images in groups:
            yield f'<article><p>{html.escape(images[0].prompt)}</p><div class="images">'
            yield from (_figure(run.folder, item) for item in images)
            yield "</div></article>"
        yield "</section>"
    yield "</html>\n"


def _figure(folder: Path, item: Judgement) -> str:
    file = io.BytesIO()
    _thumbnail(folder / item.image).save(file, "JPEG", quality=88)
    data = base64.b64encode(file.getvalue()).decode()
    kind = "" if item.correct is None else "good" if item.correct else "bad"
    caption = html.escape(_verdict(item))
    return (
        f'<figure class="{kind}"><img src="data:image/jpeg;base64,{data}" alt="{html.escape(item.image)}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _picture(run: DrawnRun, prompts: dict[str, list[list[Judgement]]]) -> Image.Image:
    """A row a skill: two images each of its first prompts, framed by verdict, over their prompt."""
    cell, text, gap = _THUMBNAIL + 8, 34, 8
    rows = [[item for images in groups[:_PROMPTS_A_SKILL] for item in images[:2]] for groups in prompts.values()]
    width = max(len(row) for row in rows) * (cell + gap) + gap
    canvas = Image.new("RGB", (width, len(rows) * (cell + text + 18 + gap) + gap), "white")
    pen, font, bold = ImageDraw.Draw(canvas), ImageFont.load_default(size=10), ImageFont.load_default(size=13)
    for number, (skill, row) in enumerate(zip(prompts, rows, strict=True)):
        top = gap + number * (cell + text + 18 + gap)
        pen.text((gap, top), skill, "#222222", bold)
        for column, item in enumerate(row):
            left = gap + column * (cell + gap)
            frame = "#999999" if item.correct is None else _GOOD if item.correct else _BAD
            image = ImageOps.expand(_thumbnail(run.folder / item.image), 4, frame)
            canvas.paste(image, (left + (cell - image.width) // 2, top + 18 + (cell - image.height) // 2))
            for line, words in enumerate(_lines(item.prompt, font, cell)):
                pen.text((left, top + 20 + cell + 11 * line), words, "#222222", font)
    return canvas


def _lines(text: str, font: ImageFont.FreeTypeFont, width: int, most: int = 3) -> list[str]:
    """Text cut into lines that fit."""
    lines = [""]
    for word in text.removeprefix("a photo of ").split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines[:most]
