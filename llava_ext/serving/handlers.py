"""Event handlers of the web page: answer messages, stop an answer, rebuild an image level by level."""

import html
import logging
import math
import threading
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder
from PIL import Image

from evotok_plugin.errors import UserError
from evotok_plugin.teacher import Teacher
from llava_ext.generation import AnswerOptions, DrawingOptions, Event, ImageDrawn
from llava_ext.generation.selection import READING
from llava_ext.model_folder import OpenModel
from llava_ext.serving.answer_batches import AnswerBatches, Turns
from llava_ext.serving.image_files import Provenance, file_scale
from llava_ext.serving.introduction import Introduction
from llava_ext.serving.level_view import level_by_level
from llava_ext.serving.page_files import PageFiles
from llava_ext.serving.session import ChatSession, Streamer
from llava_ext.serving.shown_answer import ShownAnswer, image_part, reduced, text_parts
from llava_ext.serving.uploads import UploadLimits, open_upload

logger = logging.getLogger(__name__)

ANY_ANSWER, IMAGE_ANSWER = "text or images, as the model sees fit", "an image"  # choices of "Answer with"
_PREVIEWS = 8  # previews per image
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
        max_drawings: largest number of images drawn for one message at the same time.
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
    max_drawings: int = 4
    max_waiting: int = 16
    max_batch: int = 16
    max_total_mb: float = 1024.0
    max_sessions: int = 64
    max_connections: int = 512

    def __post_init__(self) -> None:
        if not 0 < self.max_total_mb < math.inf:
            raise UserError(f"max_total_mb must be above 0, got {self.max_total_mb}")


Shown = list[dict[str, Any]]  # messages for `gr.Chatbot`


@dataclass(frozen=True)
class Turn:
    """A message of a visitor, and how it is answered.

    Attributes:
        text: the text of the message.
        shown: the content of the message on the page.
        context: the messages of the conversation before it.
        seeds: of the answer, or of each of its drawings.
        earlier: seeds of earlier drawings for the same message.
    """

    text: str
    shown: list[dict[str, Any]]
    context: Sequence[dict[str, Any]]
    options: AnswerOptions
    seeds: list[int]
    earlier: frozenset[int] = frozenset()


@dataclass(frozen=True)
class LastDrawing:
    """The last turn whose answer has a drawing, and its message in the conversation."""

    turn: Turn
    question: dict[str, Any]


@dataclass
class PageChat:
    """A visitor's conversation.

    Attributes:
        shown: the conversation as messages for `gr.Chatbot`, with images by the paths of their files.
        num_seeds: number of answers and drawings so far, each of which has a seed of its own.
        last_drawing: None if nothing was drawn yet.
    """

    session: ChatSession = field(default_factory=ChatSession)
    shown: list[dict[str, Any]] = field(default_factory=list)
    num_seeds: int = 0
    last_drawing: LastDrawing | None = None


class PageHandlers:
    """The handlers, over one model for all visitors."""

    def __init__(
        self, opened: OpenModel, limits: DemoLimits, teacher: Teacher | None, introduction: Introduction | None = None
    ) -> None:
        self.opened, self.limits, self.teacher = opened, limits, teacher
        self.introduction = introduction or Introduction()
        self.files = PageFiles(int(limits.max_total_mb * 2**20))
        self._batches = AnswerBatches(opened.model, opened.processor, limits.max_batch)
        self._turns = Turns()

    def stop(self, request: gr.Request) -> None:
        """Stop the current answer of this session; the part generated so far stays."""
        self._turns.stop(request.session_hash)

    def reset(self, request: gr.Request) -> tuple[PageChat, Shown]:
        """A new conversation, once the current answer of this session has stopped."""
        self._turns.wait(request.session_hash, _STOPPING_S)
        return PageChat(), []

    def ask(
        self, request: gr.Request, message: dict[str, Any] | None, chat: PageChat, *settings: Any
    ) -> Iterator[tuple[Any, Shown, PageChat]]:
        """Answer a message; yields updates of the text box, of the conversation on the page, and `chat`.

        On an error before the first update, the text box keeps its message and the conversation is unchanged.
        """
        with errors_on_page(), self._turns.turn(request.session_hash) as stop:
            self.files.make_room()
            options, seeds = self._parse_settings(settings, chat)
            text, files = (message or {}).get("text") or "", (message or {}).get("files") or []
            self._check_length("the message", text)
            if len(files) > self.limits.max_images:
                raise UserError(f"a message may have {self.limits.max_images} images, got {len(files)}")
            box: Any = {"text": "", "files": []}
            for shown in self._ask(chat, text, self._open_uploads(files), options, seeds, stop):
                yield box, shown, chat
                box = gr.skip()

    def example(self, number: int) -> Callable[..., Iterator[tuple[Shown, PageChat]]]:
        """Create the handler that answers an example of the introduction, counted from 0.

        It yields the conversation on the page, and `chat`.
        """
        example = self.introduction.examples[number]
        pictures = [] if example.image is None else [example.image]

        # gradio passes the request to functions with this annotation; it does not find it in a `partial`.
        def ask_example(request: gr.Request, chat: PageChat, *settings: Any) -> Iterator[tuple[Shown, PageChat]]:
            with errors_on_page(), self._turns.turn(request.session_hash) as stop:
                self.files.make_room()
                options, seeds = self._parse_settings(settings, chat)
                for shown in self._ask(chat, example.text, pictures, options, seeds, stop):
                    yield shown, chat

        return ask_example

    def redraw(self, request: gr.Request, chat: PageChat, *settings: Any) -> Iterator[tuple[Shown, PageChat]]:
        """Draw the last drawing again with other seeds; yields the conversation on the page, and `chat`.

        The drawing depends on the same part of the conversation as the last one, and is added at the end.
        """
        with errors_on_page(), self._turns.turn(request.session_hash) as stop:
            self.files.make_room()
            last = chat.last_drawing
            if last is None:
                raise UserError("nothing was drawn in this conversation yet; ask for a drawing first")
            earlier = last.turn.earlier | set(last.turn.seeds)
            options, seeds = self._parse_settings(settings, chat, draw=True, used=earlier)
            turn = replace(last.turn, options=options, seeds=seeds, earlier=earlier)
            model, processor, stream = self.opened.model, self.opened.processor, self._stream(stop)
            events = chat.session.answer(
                model, processor, turn.context, last.question, turn.text, options, seeds, stream
            )
            for shown in self._show(chat, turn, events, stop):
                yield shown, chat

    def _ask(
        self,
        chat: PageChat,
        text: str,
        pictures: Sequence[Image.Image],
        options: AnswerOptions,
        seeds: list[int],
        stop: threading.Event,
    ) -> Iterator[Shown]:
        """Answer a new message; yields the conversation on the page."""
        session, model, processor = chat.session, self.opened.model, self.opened.processor
        context = session.messages
        events = session.ask(model, processor, text, pictures, options, seeds, self._stream(stop))
        shown = [*map(image_part, pictures), *text_parts(text)]
        yield from self._show(chat, Turn(text, shown, context, options, seeds), events, stop)

    def _stream(self, stop: threading.Event) -> Streamer:
        return partial(self._batches.stream, is_stopped=stop.is_set)

    def _show(
        self, chat: PageChat, turn: Turn, events: Generator[Event, None, None], stop: threading.Event
    ) -> Iterator[Shown]:
        """Add a turn and the events of its answer to the page; yields the conversation on the page."""
        answer, before, has_drawing = ShownAnswer(partial(self._provenance, turn)), chat.shown, False

        def shown() -> Shown:
            return [*before, {"role": "user", "content": turn.shown}, {"role": "assistant", "content": answer.content}]

        with closing(events):
            for event in events:
                answer.add(event)
                has_drawing |= isinstance(event, ImageDrawn)
                yield shown()
                if stop.is_set():
                    break
        answer.end()
        chat.shown = shown()
        chat.num_seeds += len(turn.seeds)
        if has_drawing:
            chat.last_drawing = LastDrawing(turn, question=chat.session.messages[-2])
        yield chat.shown

    def _provenance(self, turn: Turn, drawn: ImageDrawn) -> Provenance:
        settings, opened = turn.options.drawing.settings(), self.opened
        if drawn.choice is not None:
            settings = settings | {"best_of": turn.options.best_of, "judge": READING, **drawn.choice.record()}
        scale = file_scale(opened.model.config.vision_config.image_size)
        seed = turn.seeds[drawn.row] + drawn.index
        return Provenance(turn.text, seed, opened.name, settings, opened.fingerprint, scale)

    def _parse_settings(
        self, settings: Sequence[Any], chat: PageChat, draw: bool = False, used: Collection[int] = ()
    ) -> tuple[AnswerOptions, list[int]]:
        """Convert the values of the page's settings, in their order on the page, to options and the seeds.

        Args:
            draw: answer with an image whatever the settings say.
            used: seeds that must not be used again.

        Raises:
            UserError: a value is missing or out of its range.
        """
        answer, tokens, guidance, schedule, start, end, rescale, negative, seed, candidates, drawings, *sampling = (
            settings
        )
        model = self.opened.model
        own = DrawingOptions().for_model(model)
        given = {"guidance_scale": guidance, **dict(zip(vars(own.sampling), sampling, strict=True))}
        needed = [value for name, value in given.items() if not isinstance(own.settings()[name], tuple)]
        others = (answer, tokens, schedule, start, end, rescale, negative, seed, candidates, drawings)
        if any(value is None for value in (*others, *needed)):
            raise UserError("a setting is empty; every one needs a value")
        if not 0 <= seed < 2**32:
            raise UserError(f"the seed must be between 0 and 2**32 - 1, got {seed}")
        self._check_length("the negative prompt", negative)
        guided = {"guidance_schedule": schedule, "guidance_interval": (start, end), "guidance_rescale": rescale}
        drawing = DrawingOptions(negative_prompt=negative, **guided, **given).for_model(model)
        num_positions = model.config.vision_config.num_positions
        draw = draw or answer == IMAGE_ANSWER
        options = AnswerOptions(
            max_new_tokens=int(tokens),
            image_first=draw,
            drawing=drawing,
            preview_every=-(-num_positions // _PREVIEWS),
            best_of=int(candidates) if draw else 1,
        )
        num_seeds, first = int(drawings) if draw else 1, int(seed) + chat.num_seeds
        num_images = num_seeds * options.best_of
        if num_images > self.limits.max_batch:
            raise UserError(
                f"{num_seeds} drawings with {options.best_of} candidates each are {num_images} images, "
                f"more than the {self.limits.max_batch} that are drawn together; reduce drawings or candidates"
            )
        while not set(range(first, first + num_seeds)).isdisjoint(used):
            first += 1
        return options, list(range(first, first + num_seeds))

    def _check_length(self, what: str, text: str) -> None:
        if len(text) > self.limits.max_chars:
            raise UserError(f"{what} has {len(text)} characters, more than the {self.limits.max_chars} allowed")

    def evolve(
        self, upload: dict[str, Any] | None
    ) -> tuple[Image.Image, list[tuple[Image.Image, str]], Image.Image, Image.Image]:
        """Rebuild an uploaded image level by level.

        Returns: the image, the images of the levels, and the curves on a light and on a dark background.
        """
        with errors_on_page():
            if not upload:
                raise UserError("no image; upload one first")
            (picture,) = self._open_uploads([upload["path"]], upload.get("orig_name"))
            self.files.make_room()
            model, processor = self.opened.model, self.opened.processor
            with self._batches.model_lock:
                levels = level_by_level(model.vision_tower, processor.image_processor, picture, self.teacher)
            return reduced(picture), levels.pictures, levels.curves, levels.dark_curves

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
