"""Event handlers of the web page: answer messages, stop an answer, rebuild an image level by level."""

import html
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.processing_utils import save_pil_to_cache
from gradio.utils import get_upload_folder
from PIL import Image

from evotok_plugin.common.pictures import enlarged
from evotok_plugin.errors import UserError
from evotok_plugin.teacher import Teacher
from llava_ext.generation import (
    AnswerOptions,
    DrawingOptions,
    Event,
    ImageDrawn,
    ImagePreview,
    ImageStarted,
    TextDelta,
)
from llava_ext.generation.selection import READING
from llava_ext.model_folder import OpenModel
from llava_ext.serving.answer_batches import AnswerBatches, Turns
from llava_ext.serving.image_files import Provenance, file_scale
from llava_ext.serving.level_view import level_by_level
from llava_ext.serving.page_files import PageFiles
from llava_ext.serving.session import ChatSession
from llava_ext.serving.uploads import UploadLimits, open_upload

logger = logging.getLogger(__name__)

ANY_ANSWER, IMAGE_ANSWER = "text or images, as the model sees fit", "an image"  # choices of "Answer with"
_PREVIEWS = 8  # previews per image
_LARGEST_SHOWN = 512  # pixels per side
_STOPPING_S = 60.0  # for the current answer to end before a new conversation


@dataclass(frozen=True)
class DemoLimits:
    """Limits of what visitors can send to the page.

    Attributes:
        upload: limits of one image.
        max_images: images per message.
        max_chars: characters per message, and of a negative prompt.
        max_new_tokens: largest number of tokens that can be requested.
        max_candidates: largest number of candidates of an image.
        max_waiting: requests that can wait for the model; further requests are rejected.
        max_batch: answers and candidates that are generated together.
        max_total_mb: size of all files of the page together, in MB; further uploads are rejected.
        max_sessions: sessions whose conversations are kept; of more, the longest unused are forgotten.
        max_connections: connections at the same time; further ones are rejected.
    """

    upload: UploadLimits = field(default_factory=UploadLimits)
    max_images: int = 4
    max_chars: int = 4000
    max_new_tokens: int = 1024
    max_candidates: int = 16
    max_waiting: int = 16
    max_batch: int = 16
    max_total_mb: float = 1024.0
    max_sessions: int = 64
    max_connections: int = 512

    def __post_init__(self) -> None:
        if not 0 < self.max_total_mb < math.inf:
            raise UserError(f"max_total_mb must be above 0, got {self.max_total_mb}")


@dataclass
class PageChat:
    """A visitor's conversation.

    Attributes:
        shown: the conversation as messages for `gr.Chatbot`, with images by the paths of their files.
    """

    session: ChatSession = field(default_factory=ChatSession)
    shown: list[dict[str, Any]] = field(default_factory=list)


class PageHandlers:
    """The handlers, over one model for all visitors."""

    def __init__(self, opened: OpenModel, limits: DemoLimits, teacher: Teacher | None) -> None:
        self.opened, self.limits, self.teacher = opened, limits, teacher
        self.files = PageFiles(int(limits.max_total_mb * 2**20))
        self._batches = AnswerBatches(opened.model, opened.processor, limits.max_batch)
        self._turns = Turns()

    def stop(self, request: gr.Request) -> None:
        """Stop the current answer of this session; the part generated so far stays."""
        self._turns.stop(request.session_hash)

    def reset(self, request: gr.Request) -> tuple[PageChat, list[dict[str, Any]]]:
        """A new conversation, once the current answer of this session has stopped."""
        self._turns.wait(request.session_hash, _STOPPING_S)
        return PageChat(), []

    def ask(
        self, request: gr.Request, message: dict[str, Any] | None, chat: PageChat, *settings: Any
    ) -> Iterator[tuple[Any, list[dict[str, Any]], PageChat]]:
        """Answer a message; yields updates of the text box, of the conversation on the page, and `chat`.

        On an error before the first update, the text box keeps its message and the conversation is unchanged.
        """
        with errors_on_page(), self._turns.turn(request.session_hash) as stop:
            self.files.make_room()
            options, seed = self._parse_settings(settings)
            text, files = (message or {}).get("text") or "", (message or {}).get("files") or []
            self._check_length("the message", text)
            if len(files) > self.limits.max_images:
                raise UserError(f"a message may have {self.limits.max_images} images, got {len(files)}")
            pictures = self._open_uploads(files)
            seed += chat.session.num_turns
            stream = partial(self._batches.stream, is_stopped=stop.is_set)
            events = chat.session.ask(self.opened.model, self.opened.processor, text, pictures, options, seed, stream)
            asked = {"role": "user", "content": [*map(_image_part, pictures), *_text_parts(text)]}
            drawing = options.drawing.settings()
            scale = file_scale(self.opened.model.config.vision_config.image_size)

            def provenance(drawn: ImageDrawn) -> Provenance:
                chosen = {}
                if drawn.choice is not None:
                    chosen = {"best_of": options.best_of, "judge": READING, **drawn.choice.record()}
                recorded, fingerprint = drawing | chosen, self.opened.fingerprint
                return Provenance(text, seed + drawn.index, self.opened.name, recorded, fingerprint, scale)

            answer = _ShownAnswer(provenance)
            shown = [*chat.shown, asked, {"role": "assistant", "content": answer.content}]
            box: Any = {"text": "", "files": []}
            with closing(events):
                for event in events:
                    answer.add(event)
                    yield box, shown, chat
                    box = gr.skip()
                    if stop.is_set():
                        break
            answer.end()
            chat.shown = shown
            yield gr.skip(), shown, chat

    def _parse_settings(self, settings: Sequence[Any]) -> tuple[AnswerOptions, int]:
        """Convert the values of the page's settings, in their order on the page, to options and a seed.

        Raises:
            UserError: a value is missing or out of its range.
        """
        answer, tokens, guidance, schedule, start, end, rescale, negative, seed, candidates, *sampling = settings
        model = self.opened.model
        own = DrawingOptions().for_model(model)
        given = {"guidance_scale": guidance, **dict(zip(vars(own.sampling), sampling, strict=True))}
        needed = [value for name, value in given.items() if not isinstance(own.settings()[name], tuple)]
        others = (answer, tokens, schedule, start, end, rescale, negative, seed, candidates)
        if any(value is None for value in (*others, *needed)):
            raise UserError("a setting is empty; every one needs a value")
        if not 0 <= seed < 2**32:
            raise UserError(f"the seed must be between 0 and 2**32 - 1, got {seed}")
        self._check_length("the negative prompt", negative)
        guided = {"guidance_schedule": schedule, "guidance_interval": (start, end), "guidance_rescale": rescale}
        drawing = DrawingOptions(negative_prompt=negative, **guided, **given).for_model(model)
        num_positions = model.config.vision_config.num_positions
        options = AnswerOptions(
            max_new_tokens=int(tokens),
            image_first=answer == IMAGE_ANSWER,
            drawing=drawing,
            preview_every=-(-num_positions // _PREVIEWS),
            best_of=int(candidates) if answer == IMAGE_ANSWER else 1,
        )
        return options, int(seed)

    def _check_length(self, what: str, text: str) -> None:
        if len(text) > self.limits.max_chars:
            raise UserError(f"{what} has {len(text)} characters, more than the {self.limits.max_chars} allowed")

    def evolve(self, upload: dict[str, Any] | None) -> tuple[Image.Image, list[tuple[Image.Image, str]], Image.Image]:
        """Rebuild an uploaded image level by level; returns the image, the images of the levels, and the curves."""
        with errors_on_page():
            if not upload:
                raise UserError("no image; upload one first")
            (picture,) = self._open_uploads([upload["path"]], upload.get("orig_name"))
            self.files.make_room()
            model, processor = self.opened.model, self.opened.processor
            with self._batches.model_lock:
                levels = level_by_level(model.vision_tower, processor.image_processor, picture, self.teacher)
            return _reduced(picture), levels.pictures, levels.curves

    def _open_uploads(self, files: Sequence[str], name: str | None = None) -> list[Image.Image]:
        """Read uploaded images without their metadata and delete the files; the page shows copies.

        Raises:
            UserError: a file was not uploaded, has too many bytes or pixels, or is not an image.
        """
        uploads = Path(get_upload_folder()).resolve()
        if not all(Path(file).resolve().is_relative_to(uploads) for file in files):
            raise UserError("no image; upload one first")
        try:
            return [open_upload(file, self.limits.upload, name) for file in files]
        finally:
            for file in files:
                Path(file).unlink(missing_ok=True)


@dataclass
class _ShownAnswer:
    """An answer in progress as the page shows it.

    Attributes:
        provenance: creates the provenance of a finished image.
        content: the `content` of a message for `gr.Chatbot`.
        drawing: whether the last part is a placeholder of an unfinished image.
    """

    provenance: Callable[[ImageDrawn], Provenance]
    content: list[dict[str, Any]] = field(default_factory=list)
    drawing: bool = False

    def add(self, event: Event) -> None:
        """Add an event to the content."""
        if isinstance(event, TextDelta):
            if not self.content or "text" not in self.content[-1]:
                self.content += _text_parts(event.text)
            else:
                self.content[-1] = {"type": "text", "text": self.content[-1]["text"] + event.text}
        elif isinstance(event, ImageStarted):
            self.drawing = True
            self.content.append({"type": "text", "text": "drawing ..."})
        elif isinstance(event, ImagePreview):
            self.content[-1] = _image_part(event.image)
        elif isinstance(event, ImageDrawn):
            self.drawing = False
            provenance = self.provenance(event)
            image = enlarged(event.image, provenance.scale).copy()
            image.info.update(provenance.as_png_text())
            self.content[-1] = _image_part(image)

    def end(self) -> None:
        """Remove an unfinished image, which is not part of the conversation."""
        if self.drawing:
            self.content.pop()
        if not self.content:
            self.content += _text_parts("(no answer)")


@contextmanager
def errors_on_page() -> Iterator[None]:
    """Show a UserError to the visitor; log any other exception and show "internal error" instead of its message."""
    try:
        yield
    except UserError as error:
        # The page renders messages as HTML.
        raise gr.Error(html.escape(str(error)), print_exception=False) from error
    except Exception as error:
        logger.exception("the page could not answer a request")
        raise gr.Error("internal error", print_exception=False) from error


def _text_parts(text: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text}] if text else []


def _image_part(image: Image.Image) -> dict[str, Any]:
    """Save an image as a file of the page; its only metadata is our PNG text."""
    # gradio names files by their content. In a separate folder, the deletion of an upload with the same content does
    # not remove the file that the page shows.
    folder = os.path.join(get_upload_folder(), "shown")
    return {"path": save_pil_to_cache(_reduced(image), folder, format="png")}


def _reduced(image: Image.Image) -> Image.Image:
    """Scale down an image that is larger than the page shows."""
    if max(image.size) <= _LARGEST_SHOWN:
        return image
    reduced = image.copy()
    reduced.thumbnail((_LARGEST_SHOWN, _LARGEST_SHOWN))
    return reduced
