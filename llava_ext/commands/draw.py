"""`evotok-llava draw`: images for prompts, one by one and as grids."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from evotok_plugin.common.files import check_output_file
from evotok_plugin.common.pictures import image_grid
from evotok_plugin.common.progress import progress_bar
from evotok_plugin.errors import UserError
from llava_ext.commands.options import SharedOptions, drawing_options
from llava_ext.model_folder import OpenModel, open_model
from llava_ext.serving.image_files import Origin, check_folder, chunks_of, file_name, write_drawn, write_png

_GRID_COLUMNS, _GRID_IMAGE = 4, 256  # images a row, and pixels a side that small ones are enlarged to
_PREVIEW = {"preview": "evotok-llava draw"}  # by this text a preview is told from pictures that someone may miss


def add(commands: argparse._SubParsersAction, shared: SharedOptions) -> None:
    parser = commands.add_parser(
        "draw",
        parents=[shared.model, shared.drawing],
        help="draw images for prompts",
        epilog="Every prompt gets images of the seeds SEED, SEED + 1, ..., written as PROMPT_seedN.png, several also "
        "together as PROMPT_grid.png. PNG text in them says how they were drawn: prompt, seed, model, settings. A file "
        "is replaced only by one of the same prompt, seed, settings and weights; beside any other a new one gets a "
        "number. Ctrl-C keeps the images of finished batches.",
    )
    parser.add_argument("prompt", nargs="*", help="what to draw; several prompts are drawn together")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="text file of further prompts, one a line")
    parser.add_argument("-n", "--num_images", type=int, default=1, help="images a prompt")
    parser.add_argument("-o", "--output", type=Path, default=Path("out"), help="folder for the images")
    parser.add_argument("--batch_size", type=int, default=16, help="images drawn together")
    parser.add_argument("--preview", type=Path, metavar="FILE", help="PNG file that shows the images taking shape")
    parser.add_argument("--preview_every", type=int, default=16, metavar="N", help="positions between two previews")
    parser.set_defaults(run=run)


@dataclass(frozen=True)
class _Job:
    """One image to draw."""

    prompt: str
    seed: int


def run(arguments: argparse.Namespace) -> None:
    """Draw, and write every image as soon as its batch is drawn."""
    prompts = _prompts(arguments)
    _check(arguments)
    options = drawing_options(arguments)
    opened = open_model(arguments)
    settings = options.for_model(opened.model).settings()
    jobs = [_Job(prompt, arguments.seed + i) for prompt in prompts for i in range(arguments.num_images)]
    images: list[Image.Image] = []

    def write(image: Image.Image, ending: str, job: _Job, **more: int) -> None:
        origin = Origin(job.prompt, job.seed, opened.name, settings | more, opened.weights)
        print(write_drawn(image, arguments.output, file_name(job.prompt) + ending, origin), flush=True)

    try:
        for job, image in _draw(opened, jobs, settings, arguments):
            write(image, f"_seed{job.seed}", job)
            images.append(image)
    except KeyboardInterrupt:
        print(f"{len(images)} of {len(jobs)} images were drawn and are kept", file=sys.stderr)
        raise
    for first in range(0, len(jobs) if arguments.num_images > 1 else 0, arguments.num_images):
        group = images[first : first + arguments.num_images]
        write(_grid(group), "_grid", jobs[first], num_images=len(group))


def _draw(
    opened: OpenModel, jobs: Sequence[_Job], settings: dict, arguments: argparse.Namespace
) -> Iterator[tuple[_Job, Image.Image]]:
    """Every job with its image, batch by batch, over a progress bar."""
    positions = opened.model.config.vision_config.num_positions
    with progress_bar(total=len(jobs) * positions, desc="drawing", unit="position") as bar:
        for start in range(0, len(jobs), arguments.batch_size):
            batch = jobs[start : start + arguments.batch_size]
            drawn = opened.model.generate_images(
                [job.prompt for job in batch],
                opened.processor,
                seed=[job.seed for job in batch],
                batch_size=len(batch),
                on_progress=lambda done, _, before=start * positions: bar.update(before + done - bar.n),
                on_preview=lambda images: write_png(_grid(images), arguments.preview, _PREVIEW),
                preview_every=arguments.preview_every if arguments.preview else 0,
                **settings,
            )
            yield from zip(batch, drawn, strict=True)


def _prompts(arguments: argparse.Namespace) -> list[str]:
    """The prompts of the command line, then those of the file, each once.

    Raises:
        UserError: there is none, one is empty, or the file cannot be read as text.
    """
    prompts = list(arguments.prompt)
    if arguments.prompts:
        try:
            lines = arguments.prompts.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompts {arguments.prompts} cannot be read as text: {error}") from error
        prompts += [line for line in lines if line.strip()]
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise UserError("expected at least one prompt and none empty; say what to draw")
    return list(dict.fromkeys(prompts))


def _check(arguments: argparse.Namespace) -> None:
    """Refuse at once what a model is not needed for to know."""
    for name in ("num_images", "batch_size", "preview_every"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    preview = arguments.preview
    if preview:
        check_output_file(preview, [".png"], "--preview")
    if preview and preview.exists() and chunks_of(preview) != _PREVIEW:
        raise UserError(f"--preview {preview} is there already and is no preview; name another file")
    check_folder(arguments.output)


def _grid(images: Sequence[Image.Image]) -> Image.Image:
    scale = max(1, _GRID_IMAGE // images[0].width)
    return image_grid(images, columns=min(_GRID_COLUMNS, len(images)), scale=scale)
