"""`evotok-llava draw`: draw images for prompts, as single files and as grids."""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from evotok_plugin.common.files import check_output_file, check_output_folder
from evotok_plugin.common.pictures import enlarged, image_grid
from evotok_plugin.common.progress import progress_bar
from evotok_plugin.errors import UserError
from llava_ext.commands.options import drawing_options, open_selected_model
from llava_ext.generation import Choice, SelectionOptions
from llava_ext.generation.selection import READING
from llava_ext.model_folder import OpenModel
from llava_ext.rewards import WeightedRewards, load_rewards
from llava_ext.serving.image_files import (
    Provenance,
    file_name,
    file_scale,
    read_png_text,
    write_drawn,
    write_png,
)

_GRID_COLUMNS = 4
_PREVIEWS = 8  # previews per batch, unless --preview_every is given
_LONGEST_PROMPTS = 100_000_000  # characters of a file of prompts
_PREVIEW = {"preview": "evotok-llava draw"}  # PNG text that marks a preview, which may be overwritten


@dataclass(frozen=True)
class _Job:
    """One image to draw."""

    prompt: str
    seed: int


def run(arguments: argparse.Namespace) -> None:
    """Draw the images and write each one as soon as its batch is finished."""
    prompts = _prompts(arguments)
    _check(arguments)
    options, selection = drawing_options(arguments), SelectionOptions(arguments.best_of)
    judge = load_rewards(arguments.judge) if arguments.judge else None
    opened = open_selected_model(arguments)
    preview_every = _preview_every(arguments, opened.model.config.vision_config.num_positions)
    settings = options.for_model(opened.model).settings()
    best_of = selection.for_model(opened.model).best_of
    selected: dict[str, Any] = {"best_of": best_of, "judge": arguments.judge or READING} if best_of > 1 else {}
    dtype = opened.model.get_input_embeddings().weight.dtype
    if dtype != torch.float32:
        selected["dtype"] = str(dtype).removeprefix("torch.")
    jobs = [_Job(prompt, arguments.seed + i) for prompt in prompts for i in range(arguments.num_images)]
    images: list[Image.Image] = []
    scale = file_scale(opened.model.config.vision_config.image_size, arguments.scale)

    def write(image: Image.Image, ending: str, job: _Job, scale: int, **more: Any) -> None:
        recorded = settings | selected | more
        provenance = Provenance(job.prompt, job.seed, opened.name, recorded, opened.fingerprint, scale)
        print(write_drawn(image, arguments.output, file_name(job.prompt) + ending, provenance), flush=True)

    try:
        for job, image, choice in _draw(opened, jobs, settings, best_of, judge, preview_every, arguments):
            write(enlarged(image, scale), f"_seed{job.seed}", job, scale, **choice.record())
            images.append(image)
    except KeyboardInterrupt:
        print(f"{len(images)} of {len(jobs)} images were drawn and are kept", file=sys.stderr)
        raise
    for first in range(0, len(jobs) if arguments.num_images > 1 else 0, arguments.num_images):
        group = images[first : first + arguments.num_images]
        write(_grid(group), "_grid", jobs[first], file_scale(group[0].width), num_images=len(group))


def _draw(
    opened: OpenModel,
    jobs: Sequence[_Job],
    settings: Mapping[str, Any],
    best_of: int,
    judge: WeightedRewards | None,
    preview_every: int,
    arguments: argparse.Namespace,
) -> Iterator[tuple[_Job, Image.Image, Choice]]:
    """Draw batch by batch under a progress bar; yield each job with its image and the choice among its candidates."""
    positions = opened.model.config.vision_config.num_positions * best_of  # of an image
    together = max(1, arguments.batch_size // best_of)  # images whose candidates are drawn at once
    finished = 0  # positions of all batches before the current one

    def on_progress(done: int, total: int) -> None:
        bar.update(finished + done - bar.n)

    def on_preview(images: Sequence[Image.Image]) -> None:
        write_png(_grid(images), arguments.preview, _PREVIEW)

    with progress_bar(total=len(jobs) * positions, desc="drawing", unit="position") as bar:
        for start in range(0, len(jobs), together):
            batch, finished = jobs[start : start + together], start * positions
            choices: list[Choice] = []
            drawn = opened.model.generate_images(
                [job.prompt for job in batch],
                opened.processor,
                seed=[job.seed for job in batch],
                batch_size=arguments.batch_size,
                best_of=best_of,
                judge=judge,
                on_choice=choices.extend,
                on_progress=on_progress,
                on_preview=on_preview,
                preview_every=preview_every,
                speculate=arguments.speculate,
                **settings,
            )
            yield from zip(batch, drawn, choices, strict=True)


def _preview_every(arguments: argparse.Namespace, num_positions: int) -> int:
    """The number of positions between two previews, 0 for no previews; reports the file of the previews on stderr.

    Raises:
        UserError: the images would be finished before the first preview.
    """
    if not arguments.preview:
        return 0
    every = arguments.preview_every or -(-num_positions // _PREVIEWS)
    if every >= num_positions:
        raise UserError(
            f"--preview_every {every}: expected less than {num_positions}, the positions of an image of this model; "
            "no preview would be written"
        )
    print(f"preview: {arguments.preview}, written after every {every} of {num_positions} positions", file=sys.stderr)
    return every


def _prompts(arguments: argparse.Namespace) -> list[str]:
    """Collect the prompts of the command line and then those of the file, without duplicates.

    Raises:
        UserError: no prompt is given, one is empty, or the file cannot be read as text.
    """
    prompts = list(arguments.prompt)
    if arguments.prompts:
        try:
            with arguments.prompts.open(encoding="utf-8") as file:
                text = file.read(_LONGEST_PROMPTS + 1)  # a device may never end
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompts {arguments.prompts} cannot be read as text: {error}") from error
        if len(text) > _LONGEST_PROMPTS:
            raise UserError(f"--prompts {arguments.prompts} is larger than {_LONGEST_PROMPTS // 10**6} MB; split it")
        lines = text.splitlines()
        prompts += [line for line in lines if line.strip()]
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise UserError("expected at least one prompt and none empty; say what to draw")
    return list(dict.fromkeys(prompts))


def _check(arguments: argparse.Namespace) -> None:
    """Validate the flags that can be checked before the model is loaded.

    Raises:
        UserError: a number is too small, or an output cannot be written.
    """
    for name in ("num_images", "batch_size", "preview_every", "speculate"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, got {value}")
    preview = arguments.preview
    if arguments.preview_every and not preview:
        raise UserError(f"--preview_every {arguments.preview_every} needs --preview FILE, the file of the previews")
    if preview:
        check_output_file(preview, [".png"], "--preview")
    if preview and preview.exists() and read_png_text(preview) != _PREVIEW:
        raise UserError(f"--preview {preview} exists and was not written as a preview; choose another file")
    check_output_folder(arguments.output)


def _grid(images: Sequence[Image.Image]) -> Image.Image:
    """A grid of images, each enlarged to at least 256 pixels."""
    return image_grid(images, columns=min(_GRID_COLUMNS, len(images)), scale=file_scale(images[0].width))
