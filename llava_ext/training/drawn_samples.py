"""Pictures of the same prompts with the same seeds in the course of training."""

from collections.abc import Sequence
from pathlib import Path

from PIL.Image import Image

from evotok_plugin.common.files import writing
from evotok_plugin.common.pictures import labeled_rows, save_picture

NUM_PROMPTS, NUM_DRAWINGS = 6, 8


def write_samples(output_dir: str | Path, step: int, prompts: Sequence[str], images: Sequence[Image]) -> Path:
    """Write `samples/step_000100.png`, a row per prompt; the images of a prompt follow each other.

    Raises:
        UserError: it cannot be written.
    """
    path = Path(output_dir) / "samples" / f"step_{step:06d}.png"
    count = len(images) // len(prompts)
    rows = {prompt: images[index * count : (index + 1) * count] for index, prompt in enumerate(prompts)}
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    save_picture(labeled_rows(rows), path)
    return path
