"""A run's images, kept in a folder with what was asked for, so that judging needs neither the model nor lmms-eval.

DIR/drawn.json      the task, and the model's answers that could not be kept
DIR/drawn.jsonl     a line an image: index, sample, image, document
DIR/images/         the images
"""

import json
import shutil
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from PIL import Image

from eval_tasks.judging.answers import image_paths, open_image
from evotok_plugin.errors import UserError

_ABOUT, _LINES = "drawn.json", "drawn.jsonl"
_THREADS = 2


@dataclass(frozen=True)
class Drawn:
    """One image: the number of its prompt, which of the prompt's images it is, its path within the folder, and the
    document that it was drawn for."""

    index: int
    sample: int
    image: str
    document: dict


@dataclass(frozen=True)
class DrawnRun:
    """A folder of drawn images of one task."""

    folder: Path
    task: str
    drawn: tuple[Drawn, ...]

    def images(self, batch_size: int) -> Iterator[list[tuple[Drawn, Image.Image]]]:
        """All images in batches, the next batch read while the present one is judged.

        Raises:
            UserError: an image is missing or broken.
        """
        batches = [self.drawn[start : start + batch_size] for start in range(0, len(self.drawn), batch_size)]
        with ThreadPoolExecutor(_THREADS) as readers:
            waiting: deque = deque()
            for batch in batches:
                waiting.append((batch, [readers.submit(open_image, self.folder / item.image) for item in batch]))
                if len(waiting) > 1:
                    yield _finished(*waiting.popleft())
            while waiting:
                yield _finished(*waiting.popleft())


def _finished(batch: Sequence[Drawn], images: Sequence) -> list[tuple[Drawn, Image.Image]]:
    return [(item, image.result()) for item, image in zip(batch, images, strict=True)]


def new_folder(parent: Path, task: str) -> Path:
    """The path of a folder for a run's images, named by the time, that is not there yet."""
    name = f"{time.strftime('%Y%m%d_%H%M%S')}_{task}"
    numbered = (parent / (name if number == 1 else f"{name}_{number}") for number in count(1))
    return next(folder for folder in numbered if not folder.exists())


def store_drawn_run(folder: Path, task: str, answers: Iterable[tuple[dict, str]]) -> DrawnRun:
    """Copy what a model has drawn into a new folder.

    Args:
        answers: documents with `index` and the model's answers. Copies, because a later run of the same model writes
            over its images.

    Raises:
        UserError: an answer is no drawing, or an image is missing; everything else has been kept by then.
    """
    (folder / "images").mkdir(parents=True, exist_ok=False)
    drawn, faults = [], []
    with (folder / _LINES).open("w", encoding="utf-8") as lines:
        for document, answer in sorted(answers, key=lambda pair: pair[0]["index"]):
            try:
                paths = image_paths(answer)
            except ValueError as error:
                faults.append(f"document {document['index']}: {error}")
                continue
            for sample, path in enumerate(paths):
                name = f"images/{document['index']:05d}_{sample}{path.suffix.lower()}"
                if (folder / name).exists():
                    faults.append(f"document {document['index']}: its number comes twice")
                    continue
                try:
                    shutil.copyfile(path, folder / name)
                except OSError as error:
                    faults.append(f"document {document['index']}: drawn image {path} cannot be copied ({error})")
                    continue
                item = Drawn(document["index"], sample, name, document)
                drawn.append(item)
                lines.write(json.dumps(vars(item)) + "\n")
    (folder / _ABOUT).write_text(json.dumps({"task": task, "images": len(drawn), "faults": faults}, indent=1) + "\n")
    if faults:
        raise UserError(
            f"{len(faults)} of the model's answers cannot be judged, first {faults[0]}; the other {len(drawn)} images "
            f"are kept in {folder}. Draw again (if answers come from lmms-eval's --use_cache, delete that cache first)"
        )
    return DrawnRun(folder, task, tuple(drawn))


def open_drawn_run(folder: Path) -> DrawnRun:
    """Read a folder that `store_drawn_run` has written.

    Raises:
        UserError: it is none, or was drawn incompletely, or holds no image.
    """
    try:
        about = json.loads((folder / _ABOUT).read_text())
        drawn = tuple(Drawn(**json.loads(line)) for line in _lines(folder / _LINES))
        task, faults = about["task"], about["faults"]
    except OSError as error:
        raise UserError(f"{folder} holds no drawn images to judge ({error})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}/{_LINES} is damaged ({error}); draw again") from error
    if faults:
        raise UserError(f"{folder} is incomplete: {len(faults)} answers are missing, first {faults[0]}; draw again")
    if not drawn:
        raise UserError(f"{folder} holds no image: the run was empty")
    return DrawnRun(folder, task, drawn)


def drawn_run_folders(folder: Path, task: str) -> list[Path]:
    """The folders of a task's kept images at or below a folder, the newest last.

    Raises:
        UserError: what stands in one of them is damaged.
    """
    found = [path.parent for path in folder.rglob(_ABOUT) if _task_of(path) == task]
    return sorted(found, key=lambda path: path.name)


def _task_of(about: Path) -> str | None:
    try:
        return json.loads(about.read_text(encoding="utf-8")).get("task")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{about} is damaged ({error}); move its folder away, or draw again") from error


def _lines(path: Path) -> list[str]:
    """The lines of a JSON-lines file; other characters that end a line elsewhere may stand within one."""
    return [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


# What lmms-eval itself leaves ----------------------------------------------------------------------------------


def samples_file(folder: Path, task: str) -> Path | None:
    """The newest lmms-eval samples file (`--log_samples`, `--predict_only`) of a task below a folder."""
    found = sorted(folder.rglob(f"*_samples_{task}.jsonl"), key=lambda path: path.name)
    return found[-1] if found else None


def answers_of(samples: Path) -> Iterator[tuple[dict, str]]:
    """The documents and answers of an lmms-eval samples file.

    Raises:
        UserError: the file has another format.
    """
    for number, line in enumerate(_lines(samples), start=1):
        try:
            row = json.loads(line)
            document, answer = json.loads(row["target"]), row["filtered_resps"]
            document["index"]
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise UserError(f"{samples}, line {number}: no answer of a drawing task ({error!r})") from error
        yield document, answer
