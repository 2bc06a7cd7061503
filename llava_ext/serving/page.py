"""The page itself: components, and what happens when they are used."""

import html
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.processing_utils import save_pil_to_cache
from gradio.utils import get_upload_folder
from PIL import Image
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from evotok_plugin.errors import UserError
from evotok_plugin.teacher import Teacher
from llava_ext.generation import DrawingOptions, Event, ImageDrawn, ImagePreview, ImageStarted, TextDelta
from llava_ext.generation.interleaved import AnswerOptions
from llava_ext.generation.options import SCHEDULES
from llava_ext.modeling_evotok_llava import EvoTokLlavaForConditionalGeneration
from llava_ext.processing_evotok_llava import EvoTokLlavaProcessor
from llava_ext.serving.image_files import Provenance
from llava_ext.serving.level_view import level_by_level
from llava_ext.serving.request_filter import RequestFilter
from llava_ext.serving.session import ChatSession
from llava_ext.serving.uploads import UploadLimits, open_upload

_MODEL_CHOOSES, _AN_IMAGE = "text or images, as the model sees fit", "an image"
_PREVIEWS = 8  # of an image while it is drawn
_SHOWN = 512  # pixels a side
_KEPT_S = 86400  # seconds that files of the page stay on disk, looked after every hour
_LOOPBACK = ["127.0.0.1", "localhost"]
_STYLE = """
#conversation .message img, #evolving img { width: 256px; object-fit: contain; image-rendering: pixelated; }
#levels img { image-rendering: pixelated; }
#levels .thumbnail-item { display: flex; flex-direction: column; height: auto; aspect-ratio: auto; }
#levels .caption-label { position: static; align-self: center; border: none; max-width: none; }
#conversation [aria-label="Share"] { display: none; }
"""


@dataclass(frozen=True)
class DemoLimits:
    """What the page takes.

    Attributes:
        upload: of one picture.
        max_images: pictures a message.
        max_chars: characters a message, and of a negative prompt.
        max_new_tokens: the most that may be asked for.
        max_waiting: requests that may wait for the model; further ones are told to come back.
    """

    upload: UploadLimits = field(default_factory=UploadLimits)
    max_images: int = 4
    max_chars: int = 4000
    max_new_tokens: int = 1024
    max_waiting: int = 16


def build_demo(
    model: EvoTokLlavaForConditionalGeneration,
    processor: EvoTokLlavaProcessor,
    limits: DemoLimits | None = None,
    teacher: Teacher | None = None,
    name: str = "EvoTok",
    weights: str = "",
) -> gr.Blocks:
    """The page for a model in evaluation mode; `launch_demo` serves it.

    Args:
        teacher: the evolution tab compares features with its own; without it, with the tokenizer's own.
        name: what the page calls the model.
        weights: the fingerprint of what is in it, which drawn images keep.
    """
    page = _Page(model, processor, limits or DemoLimits(), teacher, name, weights)
    with gr.Blocks(title=f"EvoTok: {name}", analytics_enabled=False, delete_cache=(3600, _KEPT_S)) as demo:
        gr.Markdown(f"### {html.escape(name)}: one model that reads and draws images")
        with gr.Tab("Chat"):
            _chat_tab(page)
        with gr.Tab("Evolution"):
            _evolution_tab(page)
    demo.queue(max_size=page.limits.max_waiting, default_concurrency_limit=1)
    return demo


def launch_demo(
    demo: gr.Blocks, limits: DemoLimits | None = None, host: str = "127.0.0.1", port: int = 7860, wait: bool = True
) -> str:
    """Serve a page, to this machine alone by default; gives its address.

    Args:
        limits: those that the page was built with.
        wait: until Ctrl-C; otherwise `demo.close()` ends it.

    Raises:
        UserError: the port is taken, or the host is no address of this machine, or one of IPv6.
    """
    if ":" in host:
        raise UserError(f"--host: expected a name or an IPv4 address, got {host!r}; gradio serves no others")
    guards = [Middleware(RequestFilter)]
    if host in _LOOPBACK:  # another name for this machine is a trick to read the page from a foreign one
        guards.insert(0, Middleware(TrustedHostMiddleware, allowed_hosts=_LOOPBACK))
    try:
        _, address, _ = demo.launch(
            server_name=host,
            server_port=port,
            max_file_size=(limits or DemoLimits()).upload.max_bytes,
            app_kwargs={"middleware": guards},
            theme=gr.themes.Default(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")),
            css=_STYLE,
            share=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
            run_history=False,
            footer_links=[],
            show_error=False,
            quiet=True,
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise UserError(
            f"the page cannot be served at {host}:{port}: the port is taken, or {host} is not this machine; "
            "choose another --port or --host"
        ) from error
    print(f"{address} (Ctrl-C ends it)", flush=True)
    if wait:
        demo.block_thread()
    return address


# The tabs --------------------------------------------------------------------------------------------------------


def _chat_tab(page: "_Page") -> None:
    limits, talk = page.limits, gr.State(_Talk())
    with gr.Row():
        with gr.Column(scale=3):
            shown = gr.Chatbot(
                label="Conversation",
                height=560,
                render_markdown=False,
                feedback_options=None,
                latex_delimiters=[],
                buttons=["copy_all"],
                elem_id="conversation",
            )
            message = gr.MultimodalTextbox(
                file_count="multiple",
                file_types=["image"],
                sources=["upload"],
                max_plain_text_length=limits.max_chars,
                placeholder="Ask about an image, or say what to draw",
                show_label=False,
                elem_id="message",
            )
            with gr.Row():
                stop = gr.Button("Stop", variant="stop", elem_id="stop")
                reset = gr.Button("New conversation", elem_id="reset")
        with gr.Column(scale=1, min_width=280):
            settings = _settings(limits, DrawingOptions().for_model(page.model))
    asked = message.submit(page.begin, outputs=message, api_visibility="private", queue=False).then(
        page.ask,
        inputs=[message, talk, *settings],
        outputs=[message, shown, talk],
        api_name="ask",
        concurrency_id="model",
        show_progress="minimal",
        show_progress_on=message,
    )
    # The box takes no text meanwhile: it would be lost when the message goes. `then` does not come after an error.
    for ended in (asked.success, asked.failure):
        ended(lambda: gr.update(interactive=True), outputs=message, api_visibility="private", queue=False)
    stop.click(page.stop, api_name="stop", queue=False)
    gr.on([reset.click, shown.clear], page.stop, api_visibility="private", queue=False).then(
        lambda: (_Talk(), []), outputs=[talk, shown], api_name="reset", concurrency_id="model"
    )


def _settings(limits: DemoLimits, drawing: DrawingOptions) -> list[gr.components.Component]:
    """In the order in which `_Page.ask` takes them; `drawing` is what the model's own settings are."""
    answer = gr.Radio([_MODEL_CHOOSES, _AN_IMAGE], value=_MODEL_CHOOSES, label="Answer with")
    tokens = gr.Slider(
        1, limits.max_new_tokens, min(256, limits.max_new_tokens), step=1, label="Text: new tokens at most"
    )
    guidance = gr.Number(
        drawing.guidance_scale, label="Guidance scale", info="1 and more; more follows the prompt more closely"
    )
    schedule = gr.Radio(list(SCHEDULES), value=drawing.guidance_schedule, label="Guidance over the image")
    negative = gr.Textbox("", label="Negative prompt", info="what guidance leads away from", max_lines=2)
    seed = gr.Number(0, label="Seed", precision=0, info="of the first answer; each later one has the next")
    with gr.Accordion("Sampling of images", open=True):
        sampling = [
            _sampling_setting(getattr(drawing.sampling, name), label, *limits)
            for name, label, limits in (
                ("temperature", "Temperature", (0, 2, 0.05)),
                ("top_k", "Top-k", ()),
                ("top_p", "Top-p", (0.01, 1, 0.01)),
                ("min_p", "Min-p", (0, 1, 0.01)),
            )
        ]
    return [answer, tokens, guidance, schedule, negative, seed, *sampling]


def _sampling_setting(value: float | tuple[float, ...], label: str, *limits: float) -> gr.components.Component:
    """A slider from, to and in steps of the limits, or without any a field of whole numbers; a field that starts empty
    where the model's own setting has a value for each level."""
    if isinstance(value, tuple):
        return gr.Number(None, label=label, info=f"empty: {', '.join(map(str, value))}, the model's own, one a level")
    if limits:
        low, high, step = limits
        return gr.Slider(low, max(high, value), value, step=step, label=label)
    return gr.Number(value, label=label, precision=0, info="0: all codes")


def _evolution_tab(page: "_Page") -> None:
    gr.Markdown("An image as 1, 2, ... levels of its codes rebuild it, and how close image and features come.")
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            image = gr.Image(
                label="Image",
                type="filepath",
                image_mode=None,
                format="png",
                sources=["upload", "clipboard"],
                elem_id="evolving",
            )
            start = gr.Button("Rebuild", variant="primary", elem_id="rebuild")
        curves = gr.Image(
            show_label=False,
            interactive=False,
            format="png",
            buttons=["download", "fullscreen"],
            scale=2,
            elem_id="curves",
        )
    pictures = gr.Gallery(
        show_label=False, columns=5, object_fit="contain", format="png", interactive=False, elem_id="levels"
    )
    start.click(
        page.evolve,
        inputs=[image],
        outputs=[image, pictures, curves],
        preprocess=False,  # which would decode the picture before it is looked at
        api_name="evolve",
        concurrency_id="model",
    )


# What happens ----------------------------------------------------------------------------------------------------


@dataclass
class _Talk:
    """A conversation, and how the page shows it: messages for `gr.Chatbot`, images by the paths of their files."""

    conversation: ChatSession = field(default_factory=ChatSession)
    shown: list[dict] = field(default_factory=list)


@dataclass(frozen=True)
class _Page:
    """One model for all who have the page open; `stopped` are the sessions whose answer is to end."""

    model: EvoTokLlavaForConditionalGeneration
    processor: EvoTokLlavaProcessor
    limits: DemoLimits
    teacher: Teacher | None
    name: str
    weights: str
    stopped: set[str] = field(default_factory=set)

    def begin(self, request: gr.Request) -> dict:
        """Forget a stop that was meant for an answer before; close the text box until this one is there."""
        self.stopped.discard(request.session_hash)
        return gr.update(interactive=False)

    def stop(self, request: gr.Request) -> None:
        """End the answer that this session is waiting for; what came of it stays."""
        self.stopped.add(request.session_hash)

    def ask(self, request: gr.Request, message: dict, talk: _Talk, *settings: Any) -> Iterator[tuple]:
        """Answer a message; gives what becomes of the text box, of the conversation that is shown, and of `talk`.

        The text box keeps its message, and the conversation is as before, unless the answer begins.
        """
        with _told_to_the_user():
            options, seed = self._options(settings)
            text, files = (message or {}).get("text") or "", (message or {}).get("files") or []
            self._check_length("the message", text)
            if len(files) > self.limits.max_images:
                raise UserError(f"a message may have {self.limits.max_images} images, got {len(files)}")
            pictures = self._open(files)
            seed += talk.conversation.num_turns
            events = talk.conversation.ask(self.model, self.processor, text, pictures, options, seed)
            asked = {"role": "user", "content": [*map(_file, pictures), *_words(text)]}
            drawn_with = options.drawing.settings()
            answer = _Answer(lambda index: Provenance(text, seed + index, self.name, drawn_with, self.weights))
            shown = [*talk.shown, asked, {"role": "assistant", "content": answer.content}]
            box: Any = {"text": "", "files": []}
            with closing(events):
                for event in events:
                    answer.take(event)
                    yield box, shown, talk
                    box = gr.skip()
                    if request.session_hash in self.stopped:
                        self.stopped.discard(request.session_hash)
                        break
            answer.end()
            talk.shown = shown
            yield gr.skip(), shown, talk

    def _options(self, settings: Sequence[Any]) -> tuple[AnswerOptions, int]:
        """The settings of the page, in their order, and the seed.

        Raises:
            UserError: one is missing or impossible.
        """
        answer, tokens, guidance, schedule, negative, seed, *sampling = settings
        own = DrawingOptions().for_model(self.model).sampling
        given = dict(zip(vars(own), sampling, strict=True))
        needed = [value for name, value in given.items() if not isinstance(getattr(own, name), tuple)]
        if any(value is None for value in (answer, tokens, guidance, schedule, negative, seed, *needed)):
            raise UserError("a setting is empty; every one needs a value")
        if not 0 <= seed < 2**32:
            raise UserError(f"the seed must lie in 0 .. 2**32 - 1, got {seed}")
        self._check_length("the negative prompt", negative)
        drawing = DrawingOptions(guidance, schedule, negative, **given).for_model(self.model)
        vision = self.model.config.vision_config
        return AnswerOptions(
            max_new_tokens=int(tokens),
            image_first=answer == _AN_IMAGE,
            drawing=drawing,
            preview_every=-(-vision.num_positions // _PREVIEWS),
        ), int(seed)

    def _check_length(self, what: str, text: str) -> None:
        if len(text) > self.limits.max_chars:
            raise UserError(f"{what} has {len(text)} characters, more than the {self.limits.max_chars} allowed")

    def evolve(self, upload: dict | None) -> tuple[Image.Image, list, Image.Image]:
        """Rebuild an uploaded image level by level; gives the clean image, the levels' pictures and the curves."""
        with _told_to_the_user():
            if not upload:
                raise UserError("no image; upload one first")
            (picture,) = self._open([upload["path"]], upload.get("orig_name"))
            levels = level_by_level(self.model.vision_tower, self.processor.image_processor, picture, self.teacher)
        return _reduced(picture), levels.pictures, levels.curves

    def _open(self, files: Sequence[str], name: str | None = None) -> list[Image.Image]:
        """Uploaded pictures, clean. Their files go, with all that is in them; the page shows copies.

        Raises:
            UserError: a file that was not uploaded, too many bytes or pixels, or no picture.
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
class _Answer:
    """An answer as it comes: the `content` of a message for `gr.Chatbot`.

    Attributes:
        provenance: how the image of this index is drawn.
        drawing: whether the last part stands for an image that is not whole.
    """

    provenance: Callable[[int], Provenance]
    content: list[dict] = field(default_factory=list)
    drawing: bool = False

    def take(self, event: Event) -> None:
        """Let an event join the content."""
        if isinstance(event, TextDelta):
            if not self.content or "text" not in self.content[-1]:
                self.content += _words(event.text)
            else:
                self.content[-1] = {"type": "text", "text": self.content[-1]["text"] + event.text}
        elif isinstance(event, ImageStarted):
            self.drawing = True
            self.content.append({"type": "text", "text": "drawing ..."})
        elif isinstance(event, ImagePreview):
            self.content[-1] = _file(event.image)
        elif isinstance(event, ImageDrawn):
            self.drawing = False
            image = event.image.copy()
            image.info.update(self.provenance(event.index).as_png_text())
            self.content[-1] = _file(image)

    def end(self) -> None:
        """What is not whole, goes: the model will not see it either."""
        if self.drawing:
            self.content.pop()
        if not self.content:
            self.content += _words("(no answer)")


@contextmanager
def _told_to_the_user() -> Iterator[None]:
    """User errors become messages on the page, which renders them as HTML."""
    try:
        yield
    except ValueError as error:
        raise gr.Error(html.escape(str(error)), print_exception=False) from error


def _words(text: str) -> list[dict]:
    return [{"type": "text", "text": text}] if text else []


def _file(image: Image.Image) -> dict:
    """An image as a file of the page, with no metadata but PNG text that is ours."""
    # In a folder of its own: files lie by what is in them, and an upload of the same picture goes when it is read.
    return {"path": save_pil_to_cache(_reduced(image), os.path.join(get_upload_folder(), "shown"), format="png")}


def _reduced(image: Image.Image) -> Image.Image:
    """Images that are larger than anyone looks at, made smaller."""
    if max(image.size) <= _SHOWN:
        return image
    reduced = image.copy()
    reduced.thumbnail((_SHOWN, _SHOWN))
    return reduced
