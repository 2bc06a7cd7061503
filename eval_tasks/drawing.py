"""Answers with images for lmms-eval: existing images are reused, all others are drawn in one running batch."""

import json
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from PIL.Image import Image

from eval_tasks.requests import (
    DocumentOptions,
    ImageOptions,
    PlannedImage,
    Request,
    image_seed,
    images_digest,
    is_drawn,
    sample_numbers,
    to_conversation,
    to_prompt,
)
from evotok_plugin.errors import UserError
from llava_ext.generation import AnswerOptions, AnswerRequest
from llava_ext.generation.events import Finished, ImageDrawn, TextDelta
from llava_ext.modeling_evotok_llava import EvoTokLlavaForConditionalGeneration
from llava_ext.processing_evotok_llava import EvoTokLlavaProcessor
from llava_ext.serving.image_files import prepare_folder, write_png

_MOST_WAITING = 64  # images that wait to be written
# A barely trained model generates these; a single one makes upstream's XLSX writers abort the run.
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")


def without_control_characters(text: str) -> str:
    """A model's text without control characters, and without spaces at both ends."""
    return _CONTROL_CHARACTERS.sub("", text).strip()


class ImageWriter:
    """Writes PNG files in a thread of its own while the model draws the next images.

    On exit all files are written, also after an error. An error of a file is raised by a later `write` or on exit.
    What killed runs have left in a folder is deleted once, before its first file.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._waiting: list[Future[None]] = []
        self._folders: set[Path] = set()

    def __enter__(self) -> "ImageWriter":
        return self

    def write(self, image: Image, path: Path, chunks: dict[str, str]) -> None:
        """Write a file with text chunks, as `write_png` does.

        Raises:
            UserError: an earlier file cannot be written, or this file's folder cannot be created.
        """
        while self._waiting and (self._waiting[0].done() or len(self._waiting) >= _MOST_WAITING):
            self._waiting.pop(0).result()
        if path.parent not in self._folders:
            self._folders.add(path.parent)
            prepare_folder(path.parent)
        self._waiting.append(self._thread.submit(write_png, image, path, chunks, prepared=True, compress_level=1))

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._thread.shutdown()
        if error is None:
            for one in self._waiting:
                one.result()


@dataclass
class _Answer:
    """The state of a request: its text and images so far, and the number of its answers that are not complete."""

    request: Request
    text: str = ""
    paths: list[Path] = field(default_factory=list)
    left: int = 0

    def as_json(self) -> str:
        images = [str(path) for path in self.paths]
        return json.dumps({"text": without_control_characters(self.text), "images": images})


class Drawing:
    """Answers the requests of one run that draw, edit or write documents.

    Args:
        fingerprint: of the model's folder; images of other weights are not reused.
        seed: an image depends only on it, its task, its document and its sample number.
        max_rows: images, candidates or documents that are generated together.
    """

    def __init__(
        self,
        model: EvoTokLlavaForConditionalGeneration,
        processor: EvoTokLlavaProcessor,
        fingerprint: str,
        images_dir: Path,
        seed: int,
        max_rows: int,
    ) -> None:
        self._model, self._processor, self._fingerprint = model, processor, fingerprint
        self._images_dir, self._seed, self._max_rows = images_dir, seed, max_rows
        self._owners: dict[AnswerRequest, tuple[_Answer, PlannedImage]] = {}
        self._complete: list[_Answer] = []
        self._names: dict[Path, set[str]] = {}  # by folder, of the files before this run

    def answers(self, requests: Sequence[Request]) -> Iterator[tuple[Request, str]]:
        """Yield each request with its answer, in any order; the files are written when the iterator ends.

        Requests of equal options are answered one after the other, those with long prompts first; the first ones of
        the next options join when rows are free.

        Raises:
            UserError: a request cannot be answered, or a file cannot be written.
        """
        with ImageWriter() as writer:
            for one, event in self._model.answer_all(self._missing(requests), self._processor, self._max_rows):
                answer, image = self._owners[one]
                if isinstance(event, TextDelta):
                    answer.text += event.text
                elif isinstance(event, ImageDrawn):
                    path = image.path
                    if not one.options.image_first:
                        path = path.with_stem(f"{path.stem}_{event.index}")
                        answer.paths.append(path)
                    writer.write(event.image, path, image.chunks)
                elif isinstance(event, Finished):
                    del self._owners[one]
                    answer.left -= 1
                    if not answer.left:
                        self._complete.append(answer)
                yield from self._take_complete()
            yield from self._take_complete()

    def _take_complete(self) -> Iterator[tuple[Request, str]]:
        complete, self._complete = self._complete, []
        for answer in complete:
            yield answer.request, answer.as_json()

    def _missing(self, requests: Sequence[Request]) -> Iterator[AnswerRequest]:
        """The answers that do not exist yet."""
        for options in dict.fromkeys(request.options for request in requests):
            group = [request for request in requests if request.options == options]
            for request in sorted(group, key=lambda request: -len(request.context)):
                yield from self._missing_of(request)

    def _missing_of(self, request: Request) -> Iterator[AnswerRequest]:
        if isinstance(request.options, ImageOptions):
            conversation, planned, options = self._plan_images(request, request.options)
        else:
            assert isinstance(request.options, DocumentOptions)
            conversation, planned, options = self._plan_document(request, request.options)
        answer = _Answer(request, paths=[image.path for image in planned] if options.image_first else [])
        missing = [image for image in planned if not options.image_first or not self._exists(image)]
        answer.left = len(missing)
        if not missing:
            self._complete.append(answer)
        for image in missing:
            one = AnswerRequest(conversation, image.prompt, options, image.seed)
            self._owners[one] = answer, image
            yield one

    def _exists(self, image: PlannedImage) -> bool:
        """Whether the image was drawn before this run, in the planned way."""
        folder = image.path.parent
        if folder not in self._names:
            self._names[folder] = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        return image.path.name in self._names[folder] and is_drawn(image)

    def _plan_images(
        self, request: Request, options: ImageOptions
    ) -> tuple[list[dict[str, Any]], list[PlannedImage], AnswerOptions]:
        prompt, settings = to_prompt(request), json.dumps(options.settings(), sort_keys=True)
        if not prompt.strip():
            raise UserError(f"{request.task}, document {request.doc_id}: the prompt is empty; say what to draw")
        samples = sample_numbers(request, options.num_images)
        planned = [self._planned(request, sample, prompt, settings) for sample in samples]
        conversation = [{"role": "user", "content": [{"type": "text", "text": prompt}]}]
        return conversation, planned, options.answer_options()

    def _plan_document(
        self, request: Request, options: DocumentOptions
    ) -> tuple[list[dict[str, Any]], list[PlannedImage], AnswerOptions]:
        """Plan the first image of an answer; its file also records the images that the model has read."""
        conversation = to_conversation(request)
        parts = [part for message in conversation for part in message["content"]]
        prompt = "\n".join(part["text"] for part in parts if part["type"] == "text")
        read = images_digest([part["image"] for part in parts if part["type"] == "image"])
        settings = json.dumps({**options.settings(), "read": read}, sort_keys=True)
        planned = self._planned(request, request.repeat, prompt, settings)
        return conversation, [planned], options.answer_options()

    def _planned(self, request: Request, sample: int, prompt: str, settings: str) -> PlannedImage:
        seed = image_seed(self._seed, request.task, request.doc_id, sample)
        chunks = {
            "prompt": prompt,
            "seed": str(seed),
            "model": self._fingerprint,
            "settings": settings,
        }
        path = self._images_dir / request.task / f"{request.doc_id:05d}_{sample}.png"
        return PlannedImage(path, prompt, seed, chunks)
