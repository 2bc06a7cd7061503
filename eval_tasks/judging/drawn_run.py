"""The drawn images of a run, stored in a folder together with their prompts.

Judging such a folder needs neither the model nor lmms-eval:

DIR/drawn.json      the task, the model and its settings, and the faults of answers that could not be stored
DIR/drawn.jsonl     one line per image: index, sample, image, document
DIR/images/         the images
"""

import json
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from PIL import Image

from eval_tasks.judging import drawn_with
from eval_tasks.judging.answers import image_paths, open_image
from evotok_plugin.common.files import write_json, writing
from evotok_plugin.common.foreign_files import read_json, read_text, reading
from evotok_plugin.data.bad_samples import shorten
from evotok_plugin.data.files import is_below, kind_of, path_below, read_file
from evotok_plugin.errors import UserError

_ABOUT, _LINES = "drawn.json", "drawn.jsonl"
_THREADS = 2
_LARGEST_INDEX = 10**9


@dataclass(frozen=True)
class Drawn:
    """One drawn image.

    Attributes:
        index: number of its prompt.
        sample: number of the image among those of its prompt.
        image: path within the run's folder.
        document: the document that it was drawn for.
    """

    index: int
    sample: int
    image: str
    document: dict


@dataclass(frozen=True)
class DrawnRun:
    """A folder of drawn images of one task.

    Attributes:
        about: the model and the settings of its drawings, as far as they are known: values by label.
    """

    folder: Path
    task: str
    drawn: tuple[Drawn, ...]
    about: dict[str, str] = field(default_factory=dict)

    def images(self, batch_size: int) -> Iterator[list[tuple[Drawn, Image.Image]]]:
        """All images in batches; the next batch is read in the background.

        Raises:
            UserError: an image is missing or broken.
        """
        batches = [self.drawn[start : start + batch_size] for start in range(0, len(self.drawn), batch_size)]
        with ThreadPoolExecutor(_THREADS) as readers:
            pending: deque[tuple[Sequence[Drawn], list[Future[Image.Image]]]] = deque()
            for batch in batches:
                pending.append((batch, [readers.submit(open_image, self.folder / item.image) for item in batch]))
                if len(pending) > 1:
                    yield _results(*pending.popleft())
            while pending:
                yield _results(*pending.popleft())


def _results(batch: Sequence[Drawn], images: Sequence[Future[Image.Image]]) -> list[tuple[Drawn, Image.Image]]:
    return [(item, image.result()) for item, image in zip(batch, images, strict=True)]


def new_folder(parent: Path, task: str) -> Path:
    """Create the folder of a new run, named after the time; runs that start together get different ones.

    Raises:
        UserError: it cannot be created.
    """
    name = f"{time.strftime('%Y%m%d_%H%M%S')}_{task}"
    numbered = (parent / (name if number == 1 else f"{name}_{number}") for number in count(1))
    with writing(parent):
        return next(folder for folder in numbered if _is_created(folder))


def _is_created(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        return False
    return True


def store_drawn_run(
    folder: Path,
    task: str,
    answers: Iterable[tuple[dict, str]],
    roots: Sequence[Path] | None = None,
    about: Mapping[str, str] | None = None,
) -> DrawnRun:
    """Copy the images of a model's answers into a new folder.

    They are copied because a later run of the same model overwrites its images.

    Args:
        answers: documents with `index`, and the model's answers.
        roots: folders of which one must contain an image; a relative path begins at one of them or at the working
            folder. None for answers of this process, whose model names its own files.
        about: the model and its settings, by label; the settings that the images record are added.

    Raises:
        UserError: an answer without images, or a missing image; all other images are stored nevertheless.
    """
    drawn: list[Drawn] = []
    faults: list[str] = []
    with writing(folder):
        (folder / "images").mkdir(parents=True, exist_ok=False)
        with (folder / _LINES).open("w", encoding="utf-8") as lines:
            for document, answer in sorted(answers, key=lambda pair: pair[0]["index"]):
                try:
                    paths = image_paths(answer)
                except UserError as error:
                    faults.append(f"document {document['index']}: {error}")
                    continue
                for sample, path in enumerate(paths):
                    name = f"images/{document['index']:05d}_{sample}{path.suffix.lower()}"
                    if (folder / name).exists():
                        faults.append(f"document {document['index']}: its index occurs twice")
                        continue
                    try:
                        content = read_file(_checked_path(path, roots))
                    except UserError as error:
                        faults.append(f"document {document['index']}: drawn {error}")
                        continue
                    (folder / name).write_bytes(content)
                    item = Drawn(document["index"], sample, name, document)
                    drawn.append(item)
                    lines.write(json.dumps(vars(item)) + "\n")
    known = {**(about or {}), **drawn_with.of_images(folder / item.image for item in drawn)}
    write_json(folder / _ABOUT, {"task": task, "images": len(drawn), "about": known, "faults": faults})
    if faults:
        raise UserError(
            f"{len(faults)} of the model's answers cannot be judged, first {faults[0]}; the other {len(drawn)} images "
            f"are stored in {folder}. Draw again (if answers come from lmms-eval's --use_cache, delete its cache first)"
        )
    return DrawnRun(folder, task, tuple(drawn), known)


def _checked_path(path: Path, roots: Sequence[Path] | None) -> str | Path:
    """The path of an image that an answer names.

    Raises:
        UserError: not an image file, or outside of all roots.
    """
    if kind_of(path) != "image":
        raise UserError(f"image {shorten(str(path))} does not have the name of an image file")
    return path if roots is None else path_below(path, roots, "name its folder with --images")


def open_drawn_run(folder: Path) -> DrawnRun:
    """Open a folder written by `store_drawn_run`.

    Raises:
        UserError: not such a folder, or one that is damaged, incomplete or empty.
    """
    remedy = "draw again"
    about = read_json(folder / _ABOUT, remedy=remedy)
    task, faults, known = about.get("task"), about.get("faults"), about.get("about", {})
    if not isinstance(task, str) or not isinstance(faults, list) or not isinstance(known, dict):
        raise UserError(f"{folder / _ABOUT} cannot be read: expected a task and a list of faults; {remedy}")
    with reading(folder / _LINES, remedy, "read"):
        drawn = tuple(_drawn_of(json.loads(line), folder) for line in _lines(folder / _LINES))
    if faults:
        raise UserError(f"{folder} is incomplete: {len(faults)} answers are missing, first {faults[0]}; draw again")
    if not drawn:
        raise UserError(f"{folder} holds no images: the run was empty")
    return DrawnRun(folder, task, drawn, {str(label): str(value) for label, value in known.items()})


def _drawn_of(row: dict, folder: Path) -> Drawn:
    item = Drawn(**row)
    numbers, image = (item.index, item.sample), item.image
    if not all(type(number) is int for number in numbers) or not isinstance(item.document, dict):
        raise UserError(f"expected an index, a sample, an image and a document, got {shorten(row)}")
    if not isinstance(image, str) or kind_of(image) != "image" or not is_below(folder / image, folder):
        raise UserError(f"expected an image in the folder, got {shorten(image)}")
    return item


def drawn_run_folders(folder: Path, task: str) -> list[Path]:
    """The folders of a task's drawn runs at or below a folder, the newest last.

    Raises:
        UserError: a damaged drawn.json.
    """
    found = [path.parent for path in folder.rglob(_ABOUT) if _task_of(path) == task]
    return sorted(found, key=lambda path: path.name)


def _task_of(about: Path) -> str | None:
    return read_json(about, remedy="move its folder away, or draw again").get("task")


def _lines(path: Path) -> list[str]:
    """The lines of a JSON-lines file; `str.splitlines` would also split at other characters within a line."""
    return [line for line in read_text(path, "draw again").split("\n") if line.strip()]


# lmms-eval's samples files ---------------------------------------------------------------------------------------


def samples_file(folder: Path, task: str) -> Path | None:
    """The newest samples file of lmms-eval (`--log_samples`, `--predict_only`) of a task below a folder."""
    found = sorted(folder.rglob(f"*_samples_{task}.jsonl"), key=lambda path: path.name)
    return found[-1] if found else None


def answers_of(samples: Path) -> Iterator[tuple[dict, str]]:
    """The documents and answers in a samples file of lmms-eval.

    Raises:
        UserError: the file cannot be read or has another format.
    """
    for number, line in enumerate(_lines(samples), start=1):
        with reading(f"{samples}, line {number},", "evaluate the task again", "read as an answer of a drawing task"):
            row = json.loads(line)
            document, answer = json.loads(row["target"]), row["filtered_resps"]
            index = document["index"]
            if type(index) is not int or not 0 <= index < _LARGEST_INDEX:
                raise UserError(f"expected a number as index, got {shorten(index)}")
        yield document, answer
