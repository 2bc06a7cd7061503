"""The web page: its components, and the server for them."""

import html
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.routes import file_upload_statuses
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from evotok_plugin.errors import UserError
from evotok_plugin.teacher import Teacher
from llava_ext.generation import DrawingOptions
from llava_ext.generation.options import SCHEDULES
from llava_ext.model_folder import OpenModel
from llava_ext.serving.handlers import ANY_ANSWER, IMAGE_ANSWER, DemoLimits, PageChat, PageHandlers
from llava_ext.serving.introduction import Example, Introduction
from llava_ext.serving.page_files import PageFiles, use_own_folder
from llava_ext.serving.request_filter import BodyLimits, RequestFilter
from llava_ext.serving.slow_clients import limit_slow_clients

_STYLE = Path(__file__).with_name("page.css")
_FILE_LIFETIME_S = 86400  # age at which files of the page are deleted
_CLEANUP_INTERVAL_S = 3600
_MULTIPART_BYTES = 2**16  # of an upload, next to its files
_MAX_UNREAD = 100
_POLLING_SECONDS = 0.1
_LOOPBACK = ["127.0.0.1", "localhost"]


def build_demo(
    opened: OpenModel,
    limits: DemoLimits | None = None,
    teacher: Teacher | None = None,
    introduction: Introduction | None = None,
) -> gr.Blocks:
    """Build the page for a model; `launch_demo` serves it.

    Args:
        teacher: the evolution tab compares features with the teacher's; without it, with the tokenizer's own.
        introduction: what the model knows, and examples; by default the page shows neither.
    """
    use_own_folder()
    handlers = PageHandlers(opened, limits or DemoLimits(), teacher, introduction)
    with gr.Blocks(
        title=f"EvoTok: {opened.name}",
        analytics_enabled=False,
        delete_cache=(_CLEANUP_INTERVAL_S, _FILE_LIFETIME_S),
    ) as demo:
        gr.Markdown(f"### {html.escape(opened.name)}: one model that reads and draws images")
        if handlers.introduction.knows:
            gr.HTML(f"What it knows: {html.escape(handlers.introduction.knows)}", elem_id="knows")
        with gr.Tab("Chat"):
            _chat_tab(handlers)
        with gr.Tab("Evolution"):
            _evolution_tab(handlers)
    demo.queue(max_size=handlers.limits.max_waiting, default_concurrency_limit=1)
    return demo


def launch_demo(
    demo: gr.Blocks, limits: DemoLimits | None = None, host: str = "127.0.0.1", port: int = 7860, wait: bool = True
) -> str:
    """Serve a page, by default to this machine only, and return its address.

    Args:
        limits: the limits that the page was built with.
        wait: block until Ctrl-C; otherwise `demo.close()` stops the server.

    Raises:
        UserError: the port is taken or not from 1 to 65535, the host is not an address of this machine, or it is an
            IPv6 address.
    """
    limits = limits or DemoLimits()
    if not host.strip():
        raise UserError(
            f"--host: expected a name or an IPv4 address, got {host!r}; 127.0.0.1 is this machine only, 0.0.0.0 all "
            "its addresses"
        )
    if ":" in host:
        raise UserError(f"--host: expected a name or an IPv4 address, got {host!r}; gradio serves no others")
    if not 0 < port < 2**16:
        raise UserError(f"--port must be from 1 to 65535, got {port}")
    body_limits = BodyLimits(max_upload=limits.max_images * limits.upload.max_bytes + _MULTIPART_BYTES)
    files, forget = PageFiles(int(limits.max_total_mb * 2**20)), partial(forget_unread, demo)
    middleware = [Middleware(RequestFilter, files=files, limits=body_limits, after_request=forget)]
    # A page elsewhere could reach this one under a host name that resolves to this machine.
    if host in _LOOPBACK or host.startswith("127."):
        middleware.insert(0, Middleware(TrustedHostMiddleware, allowed_hosts=[host, *_LOOPBACK]))
    try:
        _, address, _ = demo.launch(
            server_name=host,
            server_port=port,
            max_file_size=limits.upload.max_bytes,
            state_session_capacity=limits.max_sessions,
            app_kwargs={"middleware": middleware},
            theme=gr.themes.Default(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")),
            css_paths=[_STYLE],
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
    limit_slow_clients(demo.server, limits.max_connections)
    print(f"{address} (press Ctrl-C to stop)", flush=True)
    if wait:
        try:
            while demo.is_running:  # gradio's block_thread would swallow Ctrl-C and print a line of its own
                time.sleep(_POLLING_SECONDS)
        finally:
            demo.close(verbose=False)
    return address


def forget_unread(demo: gr.Blocks) -> None:
    """Limit what gradio keeps of requests whose answers nobody reads, and of uploads whose progress nobody watches."""
    queue, uploads = demo._queue, file_upload_statuses
    if len(queue.pending_event_ids_session) > 2 * _MAX_UNREAD:
        for session in list(queue.pending_event_ids_session)[:-_MAX_UNREAD]:
            if not any(event in queue.event_ids_to_events for event in queue.pending_event_ids_session[session]):
                queue.pending_event_ids_session.pop(session)
                queue.pending_messages_per_session.pop(session, None)
    for upload in list(uploads._statuses)[:-_MAX_UNREAD]:
        uploads.stop_tracking(upload)
        uploads._signals.pop(upload, None)
    for upload in list(uploads._signals)[: -2 * _MAX_UNREAD]:  # progress that was asked for without an upload
        if upload not in uploads._statuses:
            uploads._signals.pop(upload, None)


# The tabs --------------------------------------------------------------------------------------------------------


def _chat_tab(handlers: PageHandlers) -> None:
    limits, chat = handlers.limits, gr.State(PageChat())
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
            examples = []
            if handlers.introduction.examples:
                with gr.Row(elem_id="examples"):
                    examples = [_example_button(example) for example in handlers.introduction.examples]
            message = gr.MultimodalTextbox(
                file_count="multiple",
                file_types=["image"],
                sources=["upload"],
                max_plain_text_length=limits.max_chars,
                placeholder="Ask about images, or say what to draw",
                show_label=False,
                elem_id="message",
            )
            with gr.Row(equal_height=True):
                stop = gr.Button("Stop", variant="stop", visible=False, min_width=90, elem_id="stop")
                redraw = gr.Button("Draw again", interactive=False, min_width=90, elem_id="redraw")
                reset = gr.Button("New conversation", min_width=90, elem_id="reset")
        with gr.Column(scale=1, min_width=280):
            settings = _settings(limits, DrawingOptions().for_model(handlers.opened.model))
    # While an answer is generated. The text of the box is cleared once the answer starts.
    locked = [message, *examples, redraw]

    def answering() -> list[Any]:
        return [gr.update(visible=True), *(gr.update(interactive=False) for _ in locked)]

    def answered(chat: PageChat) -> list[Any]:
        *others, _ = locked
        can_redraw = gr.update(interactive=chat.last_drawing is not None)
        return [gr.update(visible=False), *(gr.update(interactive=True) for _ in others), can_redraw]

    def answer(on: Callable, handler: Callable, api_name: str, box: Sequence[gr.components.Component] = ()) -> None:
        """Let a handler answer when an event occurs; `box` is its first input and output."""
        unlisted: dict[str, Any] = {"api_visibility": "private", "queue": False}
        asked = on(answering, outputs=[stop, *locked], **unlisted).then(
            handler,
            inputs=[*box, chat, *settings],
            outputs=[*box, shown, chat],
            api_name=api_name,
            concurrency_limit=limits.max_batch,  # those that wait for the model form its next batch
            concurrency_id="answers",
            show_progress="minimal",
            show_progress_on=message,
        )
        # `then` does not run after errors.
        for ended in (asked.success, asked.failure):
            ended(answered, inputs=chat, outputs=[stop, *locked], **unlisted)

    answer(message.submit, handlers.ask, "ask", [message])
    for number, button in enumerate(examples):
        answer(button.click, handlers.example(number), f"example_{number + 1}")
    answer(redraw.click, handlers.redraw, "redraw")
    stop.click(handlers.stop, api_name="stop", queue=False)
    gr.on([reset.click, shown.clear], handlers.stop, api_visibility="private", queue=False).then(
        handlers.reset,
        outputs=[chat, shown],
        api_name="reset",
        concurrency_limit=limits.max_waiting,
        concurrency_id="reset",
    ).then(lambda: gr.update(interactive=False), outputs=redraw, api_visibility="private", queue=False)


def _example_button(example: Example) -> gr.Button:
    text = example.text if example.image is None else f"{example.text} (with an image)"
    return gr.Button(text, size="sm", min_width=0, scale=0, elem_classes="example")


def _settings(limits: DemoLimits, drawing: DrawingOptions) -> list[gr.components.Component]:
    """Create the settings in the order that `PageHandlers.ask` takes them.

    Args:
        drawing: the model's own settings, which are the initial values.
    """
    answer = gr.Radio([ANY_ANSWER, IMAGE_ANSWER], value=ANY_ANSWER, label="Answer with")
    tokens = gr.Slider(1, limits.max_new_tokens, min(256, limits.max_new_tokens), step=1, label="Text: maximum tokens")
    drawings = gr.Slider(
        1, limits.max_drawings, 1, step=1, label="Drawings", info='of answers with "an image", and of "Draw again"'
    )
    best_of = gr.Slider(
        1, limits.max_candidates, 1, step=1, label="Candidates", info="of each drawing: the best one is kept"
    )
    seed = gr.Number(0, label="Seed", precision=0, info="of the first answer or drawing; each later one adds 1")
    with gr.Accordion("Sampling of images", open=False):
        sampling = [
            _sampling_setting(getattr(drawing.sampling, name), label, *limits)
            for name, label, limits in (
                ("temperature", "Temperature", (0, 2, 0.05)),
                ("top_k", "Top-k", ()),
                ("top_p", "Top-p", (0.01, 1, 0.01)),
                ("min_p", "Min-p", (0, 1, 0.01)),
            )
        ]
    with gr.Accordion("Guidance", open=False):
        guidance = _guidance_scale(drawing)
        schedule = gr.Radio(list(SCHEDULES), value=drawing.guidance_schedule, label="Guidance over the image")
        start, end = drawing.guidance_interval or (0, 1)
        limits_of_guidance = [
            gr.Slider(0, 1, start, step=0.01, label="Start", info="fraction of the positions"),
            gr.Slider(0, 1, end, step=0.01, label="End", info="fraction of the positions"),
            gr.Slider(0, 1, drawing.guidance_rescale, step=0.05, label="Guidance rescale", info="0: off"),
        ]
        negative = gr.Textbox("", label="Negative prompt", info="prompt that guidance steers away from", max_lines=2)
    guided = [guidance, schedule, *limits_of_guidance, negative]
    return [answer, tokens, *guided, seed, best_of, drawings, *sampling]


def _guidance_scale(drawing: DrawingOptions) -> gr.components.Component:
    """Create the component of the guidance scale; a model's own scale with a value per level leaves it empty."""
    scale, label = drawing.guidance_scale, "Guidance scale"
    if isinstance(scale, Sequence):
        return gr.Number(None, label=label, info=f"empty: the model's own, {', '.join(map(str, scale))} per level")
    return gr.Number(scale, label=label, info="1 or more; larger values follow the prompt more closely")


def _sampling_setting(value: float | tuple[float, ...], label: str, *limits: float) -> gr.components.Component:
    """Create the component of a sampling value.

    Args:
        value: the model's own setting; one with a value per level leaves the field empty.
        limits: minimum, maximum and step of a slider; without them the component is a field for integers.
    """
    if isinstance(value, tuple):
        return gr.Number(None, label=label, info=f"empty: the model's own, {', '.join(map(str, value))} per level")
    if limits:
        low, high, step = limits
        return gr.Slider(low, max(high, value), value, step=step, label=label)
    return gr.Number(value, label=label, precision=0, info="0: all codes")


def _evolution_tab(handlers: PageHandlers) -> None:
    gr.Markdown("An image rebuilt from 1, 2, ... levels of its codes, and the quality of its pixels and features.")
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
        with gr.Column(scale=2, min_width=300):
            curves, dark_curves = (  # the style sheet shows the one that suits the page
                gr.Image(
                    show_label=False,
                    interactive=False,
                    format="png",
                    buttons=["download", "fullscreen"],
                    elem_id=name,
                )
                for name in ("curves", "dark_curves")
            )
    pictures = gr.Gallery(
        show_label=False, columns=5, object_fit="contain", format="png", interactive=False, elem_id="levels"
    )
    start.click(
        handlers.evolve,
        inputs=[image],
        outputs=[image, pictures, curves, dark_curves],
        preprocess=False,  # gradio would decode the upload before its limits are checked
        api_name="evolve",
        concurrency_id="model",
    )
